"""Free wordings: the ways in which people ask for an image, some of them kept from all training.

    ask(rng, "two blue stars")                 "could you draw two blue stars for me?"
    ask(rng, "two blue stars", unseen=True)    "quickly sketch two blue stars, will you?"

A request is a way to ask around a phrase, in any case and punctuation, at times with a typing slip.
In training half of the ways hold made-up words, so that the phrase is found among words that
were never heard. The ways of `UNSEEN_WAYS`, and the words that only they use, are in no training
text: the benchmark asks with them alone.
"""

import random
import re

from toy.words import ways


def words_in(text):
    """The words and numbers of a text, in lower case: a set."""
    return set(re.findall(r"\w+", text.lower().replace("'s", "")))


OPENINGS = ways("""||||please |hi, |hello! |hey, |now |ok, |could you |can you |would you |
could you please |can you please |i want you to |i would like you to |i'd like you to |let's |
try to |your task is to |would you mind to |go ahead and |be so kind and |help me: |just |
my teacher asked me to |you should |we need to |so, |next, """)
VERBS = ways("""draw|draw|draw me|paint|paint me|make|make me|create|generate|generate|show|show me|
give me|produce|design|render|print|do|draw us|come up with|put together|get me|compose|display|
output""")
PICTURES = ways("""|||||a picture of |an image of |a photo of |a drawing of |a painting of |
the image of |a picture showing |an image with |art of |a picture with |one picture of |
a small picture of |a scene with |a graphic of |a picture that shows |a simple drawing of |
a photograph of """)
ENDINGS = ways("""||||| please|, please| for me| for me please|, thanks|, thank you| for my friend|
 for my daughter| if you can| in the picture| today| for school| on my page|, it is for a card|
, i like it simple| with clean edges| as well as you can| in a simple style|, nothing fancy""")
# Ways that are no order: names of what is wanted, wishes, statements and questions.
OTHER_WAYS = ways("""{}|{}|{}|{}|i want {}|i want to see {}|i would like {}|i need {}|
i need a picture of {}|i'd like to see {}|there is {}|there should be {}|the picture shows {}|
a picture of {}|an image of {}|a photo of {}|a drawing of {}|this is {}|imagine {}|think of {}|
what does {} look like?|how about {}?|how would {} look?|can i have {}?|could i have {}?|
could i see {}?|do you have {}?|can i get {}?|{} would be nice|{}, that is what i want|
here is what i want: {}|my favourite thing is {}. draw it|i was thinking of {}|we want {} here|
picture this: {}|all i want is {}|the prompt is: {}|title: {}|yesterday i saw {}. can you draw it?|
a nice picture with {} in it|{} and that's it|once again {}|may we see {}|let there be {}""")
UNSEEN_WAYS = ways("""quickly sketch {}, will you?|illustrate {}|kindly depict {} for us|i fancy {}|
any chance of {}?|might you portray {}?|it must contain {}|an illustration of {}|
a cartoon of {} for grandma|i wish i could see {}|what i'm after is {}|bring me {} right away!|
time for {}|visualize {}|my boss demands {} by noon|here goes: {}|wallpaper featuring {}|
would love {}|surprise everybody with {}|may i ask for {}, sir?|you know what would be great? {}!|
an icon with {} on it|a sticker of {}|sorry to bother you, but could you whip up {}?|logo: {}|
exhibit {} clearly""")

DESCRIBING = ways("""big|large|small|little|nice|bright|simple|solid|lovely|beautiful|plain|perfect|
flat|cute|clean|regular|pretty""")
AMOUNTS = {
    1: ("a single", "one", "just one", "exactly one", "1", "the", ""),
    2: ("two", "two", "2", "a pair of", "a couple of", "exactly two", "two identical"),
    3: ("three", "three", "3", "a trio of", "a group of three", "exactly three", "three equal"),
    4: ("four", "four", "4", "a set of four", "a group of four", "exactly four", "four equal"),
}
JOINTS = ways("""and|and|and|and also|plus|with|as well as|together with|along with|next to|beside|
and then|and there is also|&|accompanied by""")
GROUNDS = ways(""" on a {} background| on a {} background| on {}| against a {} background|
 with a {} background| in front of a {} background|, {} background|. the background is {}|
, and the background should be {}| on a {} canvas""")
ONLY = ways("""only {}|just {}|{} and nothing else|{}, nothing else|nothing but {}|
no {other}, just {}|{} without any {other}|{}, no {other}|{} but no {other}""")
LETTERS = "abcdefghijklmnopqrstuvwxyz"

UNSEEN_WORDS = words_in(" ".join(UNSEEN_WAYS))
# Words around a phrase that leave what it asks for as it is.
AROUND = words_in(" ".join((*OPENINGS, *VERBS, *PICTURES, *ENDINGS, *OTHER_WAYS)))
AROUND = sorted(AROUND - words_in(" ".join((*JOINTS, *ONLY, *AMOUNTS[1], "not"))))


def made_up_word(rng):
    """A word of one to four syllables that is in none of `UNSEEN_WAYS`."""
    while True:
        syllables = rng.choice((1, 2, 2, 3, 4))
        word = ""
        for _ in range(syllables):
            word += rng.choice(LETTERS) + rng.choice("aeiou")
            word += rng.choice(("", "", rng.choice(LETTERS)))
        if word not in UNSEEN_WORDS:
            return word


def made_up_way(rng):
    """A way to ask that means nothing: made-up words and others around "{}"."""
    before, after = (
        [made_up_word(rng) if rng.random() < 0.6 else rng.choice(AROUND) for _ in range(number)]
        for number in (rng.randint(0, 6), rng.choice((0, 0, 1, 2, 3)))
    )
    if before:
        before[-1] += rng.choice(("", "", "", ",", ":", "!", "?"))
    comma = "," if after and rng.random() < 0.3 else ""
    return " ".join([*before, "{}" + comma, *after])


def way_to_ask(rng):
    """A way to ask of those that are trained, with "{}" for what is asked for."""
    if rng.random() < 0.4:
        return rng.choice(OTHER_WAYS)
    verb = rng.choice(VERBS) + " " + rng.choice(PICTURES)
    return rng.choice(OPENINGS) + verb + "{}" + rng.choice(ENDINGS)


def altered_way(rng):
    """A way to ask of those that are trained, with one to three of its words made up."""
    words = way_to_ask(rng).split(" ")
    around = [i for i, word in enumerate(words) if "{}" not in word]
    for i in rng.sample(around, min(len(around), rng.choice((1, 1, 2, 3)))):
        words[i] = made_up_word(rng)
    return " ".join(words)


def typing_slip(rng, text):
    """The text with one letter of a longer word left out, doubled, replaced or swapped."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long:
        return text
    number = rng.choice(long)
    word = words[number]
    i = rng.randrange(1, len(word) - 1)
    slips = (
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word[:i] + rng.choice(LETTERS) + word[i + 1 :],
        word[:i] + word[i + 1] + word[i] + word[i + 2 :],
    )
    words[number] = rng.choice(slips)
    return " ".join(words)


def written(rng, text):
    """A request as it may be typed: with a slip, in any case and punctuation."""
    if rng.random() < 0.1:
        text = typing_slip(rng, text)
    if text[-1].isalnum():
        ends = ("", "", "", ".", ".", "!", "...")
        text += "?" if text.startswith(("could", "can ", "would")) else rng.choice(ends)
    case = rng.choice((str, str, str.capitalize, str.capitalize, str.upper, str.title))
    return case(text)


def ask(rng, phrase, unseen=False):
    """A request for what `phrase` names; `unseen`: in a way that no training text uses."""
    way = rng.choice(UNSEEN_WAYS) if unseen else way_to_ask(rng)
    text = written(rng, way.format(phrase))
    own = random.Random(text)  # not rng: the benchmark's cases depend on how often it is used
    if not unseen and own.random() < 0.5:
        make_way = altered_way if own.random() < 0.5 else made_up_way
        text = written(own, make_way(own).format(phrase))
    return text
