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
