"""What the instructions say: per operation three training wordings and one unseen wording; compositions; mixtures.

``{c}`` stands for the content.
"""

TRAINING_WORDINGS: dict[str, tuple[str, str, str]] = {
    "sum": ("Add up: {c}", "Compute the total: {c}", "{c} | give the sum"),
    "next_number": ("Continue the series: {c}", "Next number: {c}", "{c} | what follows"),
    "add_days": ("Move the date: {c}", "Which date is it after: {c}", "{c} | new date"),
    "add_weekdays": ("Which weekday: {c}", "Count the days: {c}", "{c} | day of the week"),
    "truth": ("Is this true: {c}", "Evaluate the logic: {c}", "{c} | true or false"),
    "returns_home": ("Back at the start: {c}", "Follow the steps: {c}", "{c} | home again"),
    "close_brackets": ("Close the brackets: {c}", "Complete the nesting: {c}", "{c} | what is missing"),
    "add_minutes": ("What time is it after: {c}", "Move the clock: {c}", "{c} | new time"),
    "last_item": ("Give the last one: {c}", "Keep only the end: {c}", "{c} | last"),
    "drop_first": ("Drop the first one: {c}", "All but the first: {c}", "{c} | without the first"),
    "longest": ("Find the longest word: {c}", "Longest: {c}", "{c} | longest word"),
    "largest": ("Find the largest number: {c}", "Largest: {c}", "{c} | maximum"),
    "reverse_order": ("Reverse the order: {c}", "List backwards: {c}", "{c} | last to first"),
    "sort_words": ("Sort the words: {c}", "Alphabetical order: {c}", "{c} | from a to z"),
    "sort_numbers": ("Sort the numbers: {c}", "Increasing order: {c}", "{c} | small to large"),
    "rotate": ("Move the first to the end: {c}", "Rotate the list: {c}", "{c} | rotate left"),
    "reverse_letters": ("Spell each word backwards: {c}", "Mirror the words: {c}", "{c} | letters reversed"),
    "pig_latin": ("Say in pig latin: {c}", "Translate to pig latin: {c}", "{c} | pig latin"),
    "drop_vowels": ("Remove the vowels: {c}", "Only consonants after the first: {c}", "{c} | no vowels"),
    "initials": ("Give the initials: {c}", "First letters: {c}", "{c} | initials"),
    "shift_letters": ("Shift the letters by one: {c}", "Encode: {c}", "{c} | next letters"),
    "word_lengths": ("Count the letters: {c}", "Length of each word: {c}", "{c} | how long"),
    "swap_ends": ("Swap first and last letters: {c}", "Exchange the ends: {c}", "{c} | swap the ends"),
    "add_one": ("Add one to each: {c}", "Increase every number: {c}", "{c} | plus one"),
    "parity": ("Odd or even: {c}", "Say the parity: {c}", "{c} | parity"),
    "spell_digits": ("Spell the digits: {c}", "Say digit by digit: {c}", "{c} | digits as words"),
    "capitals": ("Write in capitals: {c}", "Upper case: {c}", "{c} | all capitals"),
    "title_case": ("Capitalise each word: {c}", "As a title: {c}", "{c} | title case"),
    "dashes": ("Join with dashes: {c}", "Hyphenate: {c}", "{c} | with dashes"),
    "commas": ("Separate by commas: {c}", "Comma list: {c}", "{c} | with commas"),
    "no_spaces": ("Remove the spaces: {c}", "Glue together: {c}", "{c} | without spaces"),
    "slashes": ("Separate by slashes: {c}", "Slash list: {c}", "{c} | with slashes"),
    "round_brackets": ("Put in brackets: {c}", "Add parentheses: {c}", "{c} | in brackets"),
    "quotes": ("Put in quotes: {c}", "Quote: {c}", "{c} | as a quotation"),
    "shout": ("Say it loudly: {c}", "Exclaim: {c}", "{c} | with an exclamation mark"),
    "stars": ("Put between stars: {c}", "Mark as bold: {c}", "{c} | with stars"),
}

NEW_WORDINGS: dict[str, str] = {
    "capitals": "Please use big letters for this -> {c}",
    "reverse_order": "Start from the far side -> {c}",
    "sort_words": "How would a dictionary list these: {c}",
    "pig_latin": "Children's secret talk -> {c}",
    "initials": "{c} | abbreviate every word",
    "longest": "Which has the most letters: {c}",
    "dashes": "Hyphens instead of blanks -> {c}",
    "largest": "The biggest of them is: {c}",
    "sum": "Work out the result of: {c}",
    "add_days": "{c} | tell me the calendar day",
    "truth": "Judge this statement -> {c}",
    "add_minutes": "My watch will then show: {c}",
}

COMPOSITIONS: dict[tuple[str, ...], tuple[str, str]] = {
    ("reverse_order", "dashes"): ("words", "Reverse the order and join with dashes: {c}"),
    ("sort_words", "capitals"): ("words", "Sort the words in capitals: {c}"),
    ("longest", "reverse_letters"): ("words", "Find the longest word and spell it backwards: {c}"),
    ("initials", "no_spaces"): ("words", "Make an acronym: {c}"),
    ("drop_vowels", "capitals"): ("words", "Remove the vowels in capitals: {c}"),
    ("pig_latin", "commas"): ("words", "A comma list in pig latin: {c}"),
    ("last_item", "shout"): ("words", "Give the last one loudly: {c}"),
    ("sort_numbers", "round_brackets"): ("numbers", "Sort the numbers in brackets: {c}"),
    ("largest", "spell_digits"): ("numbers", "Spell the digits of the largest: {c}"),
    ("sum", "stars"): ("sum", "Add up and put between stars: {c}"),
    ("add_days", "capitals"): ("date", "Move the date, in capitals: {c}"),
    ("rotate", "swap_ends"): ("words", "Rotate the list and swap the ends: {c}"),
    ("reverse_order", "capitals", "dashes"): ("words", "Backwards in capitals with dashes: {c}"),
}

# name -> two halves (operation, kind of content, wording)
MIXTURES: dict[str, tuple[tuple[str, str, str], tuple[str, str, str]]] = {
    "rule_a_or_b": (("capitals", "words", "Rule A: {c}"), ("reverse_order", "words", "Rule B: {c}")),
    "code_one_or_two": (("pig_latin", "words", "Code 1: {c}"), ("initials", "words", "Code 2: {c}")),
    "case_or_sort": (("capitals", "words", "Upper case: {c}"), ("sort_words", "words", "Sort the words: {c}")),
    "words_or_numbers": (("reverse_order", "words", "Handle: {c}"), ("dashes", "numbers", "Handle: {c}")),
    "last_or_brackets": (("last_item", "words", "Process: {c}"), ("round_brackets", "numbers", "Process: {c}")),
    "dates_or_words": (("add_days", "date", "Do it: {c}"), ("capitals", "words", "Do it: {c}")),
    "quotes_or_stars": (("quotes", "words", "Left: {c}"), ("stars", "words", "Right: {c}")),
    "vowels_or_dashes": (("drop_vowels", "words", "Red: {c}"), ("dashes", "words", "Blue: {c}")),
}
