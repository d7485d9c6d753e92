"""How documents begin: what a model continues when it writes its own calibration text.

A model that starts from nothing repeats itself; one that is given beginnings of many registers writes as many kinds of
text, also where it was tuned for dialogue. Written for this project.
"""

OPENINGS = (
    # encyclopaedias and reference
    "The city of",
    "He was born in",
    "The species is",
    "The river flows",
    "In mathematics,",
    "The album was",
    "During the war,",
    "The museum",
    "The government of",
    "There are several types of",
    "The word comes from",
    "The church was built",
    # news and business
    "According to a report published on Monday,",
    "The president said",
    "The company announced",
    "The team won",
    "On Sunday,",
    "Police are looking for",
    "Prices rose in",
    "The court held that",
    # teaching and science
    "Scientists have found that",
    "A study of",
    "Abstract\n",
    "This paper presents",
    "The results show",
    "Students will learn",
    "Plants need",
    "Energy is",
    "The disease is caused by",
    "For example, suppose",
    "In the early years of the century,",
    "Chapter 1\n",
    # how to, questions and answers
    "The first step is to",
    "How do I",
    "I have a problem with",
    "To make this soup, you will need",
    "Here are some tips for",
    "The best way to",
    "What are the benefits of",
    "Question: What is",
    "When you install",
    "If you are looking for",
    # the web
    "Welcome to",
    "We stayed at this hotel for",
    "This book is",
    "I love this",
    "Our products are",
    "Read more about",
    "Please contact us",
    "The film tells the story of",
    "Many people think that",
    "On the other hand,",
    # stories and letters
    "Once upon a time,",
    "She opened the door and",
    '"I don\'t know," he said,',
    "It was raining when",
    "The old man",
    "My dear friend,",
    "As a child, I",
    "Tom and his sister",
    # code
    "def",
    "import",
    "#include <",
    "The method returns",
)
