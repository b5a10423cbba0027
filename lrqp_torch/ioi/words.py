"""The words of the indirect-object-identification task: templates, and what fills them.

``{S}`` is the subject, the name that the second clause repeats, and ``{IO}`` the indirect object,
the answer. A BABA template has the subject first; its ABBA twin has the two names of the first
clause swapped. Each ends just before the answer, and every name is preceded by a space, because
that is how it is one token, in GPT-2's and in SmolLM2's vocabulary. Names that are also ordinary
words or places (Grace, Mark, Virginia) are left out, so that a name's logit is about the person.
Other vocabularies may split some of them; the data set then leaves those out and says so.

Task: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593); the wording is our own.
"""

BABA_TEMPLATES: tuple[str, ...] = (
    "After {S} and {IO} arrived at the {PLACE}, {S} gave a {OBJECT} to",
    "When {S} and {IO} met at the {PLACE}, {S} handed a {OBJECT} to",
    "While {S} and {IO} were waiting at the {PLACE}, {S} offered a {OBJECT} to",
    "Yesterday {S} and {IO} walked to the {PLACE}. {S} wanted to give a {OBJECT} to",
    "Last week {S} and {IO} spent a day at the {PLACE}, and {S} gave a {OBJECT} to",
    "Before {S} and {IO} left the {PLACE}, {S} passed a {OBJECT} to",
    "Because {S} and {IO} were both at the {PLACE}, {S} decided to give a {OBJECT} to",
    "Early in the morning {S} and {IO} found a {OBJECT} near the {PLACE}. {S} gave it to",
    "At the {PLACE}, {S} and {IO} talked about a {OBJECT}. Afterwards {S} gave it to",
    "The friends {S} and {IO} bought a {OBJECT} near the {PLACE}. Then {S} handed it to",
    "It was raining when {S} and {IO} reached the {PLACE}, so {S} lent a {OBJECT} to",
    "On the way to the {PLACE}, {S} and {IO} had an argument, but {S} gave the {OBJECT} to",
    "As soon as {S} and {IO} sat down at the {PLACE}, {S} showed a {OBJECT} to",
    "Once {S} and {IO} had finished work at the {PLACE}, {S} offered a {OBJECT} to",
    "Everybody saw {S} and {IO} at the {PLACE}, where {S} sold a {OBJECT} to",
    "There was a party for {S} and {IO} at the {PLACE}, and {S} presented a {OBJECT} to",
    "In the evening {S} and {IO} drove to the {PLACE}. There {S} threw a {OBJECT} to",
    "Later that day {S} and {IO} returned from the {PLACE}, and {S} delivered a {OBJECT} to",
)

ABBA_TEMPLATES: tuple[str, ...] = tuple(
    template.replace("{S} and {IO}", "{IO} and {S}") for template in BABA_TEMPLATES
)

# fmt: off
NAMES: tuple[str, ...] = (
    "Aaron", "Adam", "Alan", "Albert", "Alex", "Alice", "Amanda", "Amy", "Andrea", "Andrew",
    "Angela", "Anna", "Anthony", "Arthur", "Barbara", "Benjamin", "Brian", "Bruce", "Carl",
    "Caroline", "Catherine", "Charles", "Charlotte", "Christina", "Claire", "Craig", "Daniel",
    "David", "Dennis", "Diana", "Dorothy", "Edward", "Elizabeth", "Emily", "Emma", "Eric",
    "Frederick", "Gary", "George", "Greg", "Hannah", "Helen", "Henry", "Jacob", "James", "Jane",
    "Janet", "Jason", "Jeff", "Jennifer", "Jeremy", "Jessica", "John", "Jonathan", "Joseph",
    "Joshua", "Julia", "Julie", "Justin", "Karen", "Kate", "Keith", "Kenneth", "Kevin", "Larry",
    "Laura", "Lauren", "Linda", "Lisa", "Lucy", "Luke", "Margaret", "Maria", "Martha", "Martin",
    "Mary", "Matthew", "Melissa", "Michael", "Michelle", "Monica", "Nancy", "Nathan", "Nicholas",
    "Nicole", "Oliver", "Olivia", "Patricia", "Patrick", "Paul", "Peter", "Philip", "Rachel",
    "Rebecca", "Ruth", "Samantha", "Sarah", "Simon", "Sophie", "Susan",
)

PLACES: tuple[str, ...] = (
    "market", "library", "beach", "museum", "restaurant", "park", "theater", "school", "station",
    "farm",
)

OBJECTS: tuple[str, ...] = (
    "book", "letter", "ticket", "lamp", "basket", "ball", "camera", "hat", "key", "flower",
)
# fmt: on
