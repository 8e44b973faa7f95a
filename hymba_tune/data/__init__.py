"""From sources to rows: mixes of conversations, their tokens and loss masks, packed for the trainer."""
