"""Reports: what a run wrote, collected into results.json and rendered for reading. Reads files, never objects."""
