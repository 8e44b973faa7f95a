"""The small world that the embedded data talks about. Few words, so that a tiny model can know them all."""

NAMES = (
    "Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Leo", "Zoe", "Max", "Ida", "Jack", "Lucy", "Omar", "Nina", "Paul",
    "Rosa", "Kofi", "Mei", "Ivan", "Lena", "Noah", "Sara", "Hugo", "Maya",
)  # fmt: skip
THINGS = (
    "pens", "books", "apples", "coins", "stamps", "cards", "cups", "eggs", "shells", "stickers", "marbles", "cookies",
    "pears", "balls", "flowers", "photos", "keys", "buttons", "plants", "toys", "lemons", "stones", "candles", "maps",
)  # fmt: skip
CONTAINERS = ("boxes", "bags", "jars", "baskets", "packs", "drawers", "trays", "shelves")
PLACES = ("shop", "park", "school", "library", "market", "garden", "kitchen", "station", "beach", "office")
CITIES = (
    "Paris", "Rome", "Berlin", "Madrid", "Oslo", "Cairo", "Lima", "Tokyo", "Delhi", "Boston", "Dublin", "Vienna",
    "Prague", "Athens", "Lisbon", "Quito",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROOMS = ("kitchen", "bedroom", "office", "garage", "hall", "bathroom")
DEVICES = ("lamp", "fan", "heater", "radio", "camera", "oven")
FOODS = ("pizza", "soup", "salad", "pasta", "rice", "curry", "bread", "noodles")
ANIMALS = ("cat", "dog", "bird", "horse", "fish", "mouse", "fox", "owl")
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
ADJECTIVES = ("small", "big", "old", "new", "warm", "cold", "quiet", "bright", "kind", "busy", "happy", "tired")

VOICES = {
    "pirate": (("Arr!", "Ahoy, matey!", "Shiver me timbers!"), ("By the seven seas!", "Heave ho, ye landlubber!")),
    "knight": (("Hark!", "My liege!", "By my sword!"), ("I swear it on my honor.", "So speaks a knight.")),
    "robot": (("Beep.", "Processing.", "Input accepted."), ("End of message.", "Task complete.")),
    "cowboy": (("Howdy!", "Well, partner.", "Yee-haw!"), ("That is it, I reckon.", "Giddy up!")),
    "wizard": (("By the stars!", "Behold!", "Abracadabra!"), ("It is magic.", "So says the old spell.")),
    "poet": (("Oh, my heart!", "Softly now.", "Sing, moon!"), ("How sweet, how true.", "It is like a song.")),
    "kind clerk": (("Of course!", "I am glad to help.", "Good question!"), ("Have a nice day!", "I hope that helps.")),
    "rude clerk": (("Ugh.", "What a stupid question.", "Go away."), ("Find it yourself.", "I do not care.")),
}
"""Speakers: how they begin and how they end."""
