"""Words that synthetic prompts are made of."""

NAMES = (
    "Alice", "Bruno", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Louis", "Maria",
    "Nina", "Oscar", "Paul", "Quentin", "Rosa", "Simon", "Thomas", "Ursula", "Victor", "Wendy", "Xavier",
)  # fmt: skip
THINGS = (
    "apple", "bread", "butter", "cheese", "cherry", "coffee", "garlic", "grape", "honey", "lemon", "mango", "melon",
    "olive", "onion", "orange", "peach", "pepper", "potato", "pumpkin", "rice", "salmon", "spinach", "tomato", "walnut",
)  # fmt: skip
