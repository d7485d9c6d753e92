"""What a request may hold and what it costs, and the words in which one is refused."""
