"""The language of the bundled model: little stories about villagers, and questions about them.

A passage is a row of sentences, each stating facts of the form (person, relation, value). Persons and values
are drawn uniformly, so nothing but the passage tells the answer: a guess is right once in `len(values)`.
Everything is a pure function of a `random.Random`, hence of a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

NAMES = tuple(
    """Ada Agnes Albert Alma Amos Anna Anton Arthur Astrid Aurora Basil Beatrix Ben Bertha Boris Bruno Carla Cecil Celia
    Clara Conrad Cora Cyril Daisy Daniel Daphne David Delia Dora Edgar Edith Edwin Elena Elias Ella Elmer Elsa Emil Emma
    Enid Erik Esther Ethel Eva Felix Fiona Flora Frank Frida Gavin George Gerda Gilbert Ginny Grace Greta Gustav Hanna
    Harold Hazel Hector Heidi Helen Henry Hilda Hugo Ida Igor Ingrid Irene Iris Ivan Jacob James Jane Jasper Joan Jonas
    Josef Judith Julia Karl Kate Klara Lara Laura Lena Leo Lewis Lilian Linus Lotte Louis Lucy Lydia Mabel Magnus Maria
    Martin Mary Matilda Max Mira Mona Nadia Nancy Nathan Nell Nina Nora Norman Olaf Olga Oliver Olive Oscar Otto Pablo
    Paul Paula Pearl Peter Petra Philip Rachel Ralph Rita Robert Rosa Ruben Rufus Ruth Samuel Sarah Silas Simon Sofia
    Sonia Stella Susan Sven Tessa Theo Thomas Tilda Tobias Ulla Ursula Vera Victor Viola Walter Wanda Wilma Yusuf
    Zelda""".split()
)
TOWNS = tuple(
    start + end
    for start in "Oak Ash Elm Stone Brook Fox Raven Winter Silver Mill".split()
    for end in "ford ham ton wick dale field bury bridge moor haven".split()
)
JOBS = tuple(
    """archer artist baker banker barber brewer builder butcher carpenter clerk cobbler cook cooper dancer dentist
    doctor driver farmer fisher florist forester gardener glazier grocer hatter hunter inventor jeweler judge lawyer
    locksmith mason merchant miller miner musician notary nurse painter pilot plumber poet porter potter printer
    ranger roofer saddler sailor scholar sculptor shepherd singer smith soldier tailor tanner teacher weaver writer""".split()
)
PETS = tuple(
    """badger beaver beetle camel canary cat cow cricket crow deer dog donkey dove duck eagle falcon ferret finch frog
    goat goose hamster hare hawk hedgehog hen horse lamb lizard llama magpie mole monkey mouse mule otter owl parrot
    peacock pig pigeon pony rabbit ram rat rooster seal sheep snail snake sparrow squirrel stork swan toad turkey turtle
    weasel wolf wren""".split()
)
OBJECTS = tuple(
    """anchor apron armchair atlas axe balloon banner barrel basket bell belt bicycle blanket boat bonnet book bottle
    bowl bracelet broom brush bucket button cabinet candle cane canoe carpet cart chain chair chest clock cloak coat
    comb compass cradle crate crown cup curtain cushion desk diary doll drawer fan feather fence flag flask fork frame
    funnel globe glove goblet hammer hammock handkerchief hat helmet hook jacket jar jug kettle key kite knife ladder
    lamp lantern locket loom magnet map mask mattress medal mirror mitten mug necklace needle net notebook oar oven
    paddle pan parasol pen pencil pillow pipe pitcher plate plow pot purse puzzle quilt rake ribbon ring robe rope rug
    saddle sail scarf scissors shawl shovel sled sofa spade spoon stool stove sword table teapot tent thimble torch
    towel tray trunk umbrella vase wagon wallet watch wheel whistle""".split()
)
FOODS = tuple(
    """apples apricots bacon barley beans beets berries biscuits bread broth butter cabbage cake carrots cheese cherries
    chestnuts chicken chocolate corn cucumbers dates dumplings eggs fennel figs fish garlic ginger grapes ham honey jam
    leeks lemons lentils lettuce mangoes melons mushrooms mustard noodles nuts oats olives onions oranges pancakes
    pasta peaches pears peas pickles plums porridge potatoes pudding pumpkin radishes raisins rice salad salmon sausages
    soup spinach stew toast tomatoes trout turnips waffles walnuts yogurt""".split()
)
INSTRUMENTS = tuple(
    """accordion banjo bassoon bugle cello clarinet cornet cymbals drum dulcimer fiddle flute gong guitar harmonica harp
    horn lute lyre mandolin marimba oboe organ piano piccolo recorder saxophone sitar tambourine triangle trombone
    trumpet tuba ukulele viola violin xylophone zither""".split()
)
COLOURS = tuple(
    """amber aqua beige black blue bronze brown copper coral cream crimson emerald gold green grey indigo ivory jade
    lavender lilac maroon mauve olive orange peach pink purple red rose ruby rust scarlet silver tan teal turquoise
    violet white yellow""".split()
)
PLANTS = tuple(
    """asters bamboo begonias birches bluebells cacti camellias cedars clover cypresses daffodils dahlias daisies ferns
    gorse heather hollies irises ivy jasmine larches laurels lilacs lilies lupins magnolias maples marigolds mint
    moss myrtles nettles orchids pansies peonies pines poplars poppies primroses roses sage snowdrops spruces sunflowers
    thistles thyme tulips violets willows yews""".split()
)
FEARS = tuple(
    """bats bees bridges caves cellars clowns crowds darkness dragons fire floods fog ghosts giants hail heights ice
    lightning mirrors needles noise pirates rain robbers shadows sharks silence snakes snow spiders storms thieves
    thunder tigers trains tunnels wasps water wind witches wolves""".split()
)


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how a story states it, how one asks for the value, and how one asks for the person.

    `statements[0]` is also the wording of every answer. `{p}` is the person, `{v}` the value with its article.
    """

    values: tuple[str, ...]
    statements: tuple[str, ...]
    ask_value: str
    ask_person: str
    article: bool = False

    def noun(self, value: str) -> str:
        """The value as it stands in a sentence, with `a` or `an` where the relation wants one."""
        if not self.article:
            return value
        return f"{'an' if value[0] in 'aeiou' and not value.startswith('uk') else 'a'} {value}"


RELATIONS = (
    Relation(TOWNS, ("{p} lives in {v}", "{p} has a house in {v}"), "Where does {p} live?", "Who lives in {v}?"),
    Relation(JOBS, ("{p} is {v}", "{p} works as {v}"), "What is the work of {p}?", "Who is {v}?", True),
    Relation(PETS, ("{p} keeps {v}", "{p} has a pet, {v}"), "Which animal does {p} keep?", "Who keeps {v}?", True),
    Relation(OBJECTS, ("{p} bought {v}", "{p} went to the market and bought {v}"), "What did {p} buy?", "Who bought {v}?", True),
    Relation(FOODS, ("{p} likes eating {v}", "{p} is fond of {v}"), "What does {p} like eating?", "Who likes eating {v}?"),
    Relation(INSTRUMENTS, ("{p} plays the {v}", "{p} is learning the {v}"), "What does {p} play?", "Who plays the {v}?"),
    Relation(COLOURS, ("{p} has {v} door", "{p} lives behind {v} door"), "Which colour has the door of {p}?", "Who has {v} door?", True),
    Relation(PLANTS, ("{p} grows some {v}", "{p} has a garden full of {v}"), "What does {p} grow?", "Who grows some {v}?"),
    Relation(FEARS, ("{p} hides from {v}", "{p} is afraid of {v}"), "What does {p} hide from?", "Who hides from {v}?"),
)  # fmt: skip

MOST_PEOPLE_OF_A_RELATION = 32
ANSWERS = frozenset(NAMES).union(*(relation.values for relation in RELATIONS))

OPENINGS = (
    "In the morning", "One day in spring", "After the rain", "In those years", "Before the harvest", "At last",
    "Later that week", "On market day", "As everybody knows", "Since last winter",
)  # fmt: skip
FILLERS = (
    "The road was long and the sun was low.", "Nobody in the valley was in a hurry.", "It rained for three days.",
    "The river ran quietly behind the houses.", "A cold wind came down from the hills.",
    "The children laughed and ran home.", "The bells rang at noon.", "Smoke rose from the chimneys.",
    "The old bridge creaked under the carts.", "That evening the stars were bright.",
    "The market was full of people.", "Snow lay on the roofs until March.", "Everyone had a story to tell.",
    "The moon stood high above the mill.", "Then it was quiet again.",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about one fact, (person, value), of a passage. `key` is the one of the two that must be found."""

    text: str
    answer: str  # a whole sentence
    fact: tuple[str, str]
    key: str


@dataclass(frozen=True)
class Story:
    """A passage and questions about it, in random order, no two alike."""

    passage: str
    questions: tuple[Question, ...]


def make_story(rng: Random, target_length: int, length: Callable[[str], float], *, variety: float = 1.0) -> Story:
    """A story whose passage is the longest row of whole sentences with `length(sentence)` summing to at most the
    target.

    Within a passage, each person has at most one value of a relation, and each value at most one person. Only some of
    the relations occur, so that several people share each: who reads must tell them apart, not only know a trade from
    a town.
    """
    num_facts = max(2, target_length // 9)
    fewest = -(-num_facts // MOST_PEOPLE_OF_A_RELATION)
    relations = rng.sample(range(len(RELATIONS)), max(fewest, rng.choice((1, 1, 2, 2, 3, 4, 6, 9))))
    num_people = min(len(NAMES), rng.randint(-(-num_facts // len(relations)), num_facts))
    people = rng.sample(NAMES, max(2, num_people))
    unused_values = [rng.sample(relation.values, len(relation.values)) for relation in RELATIONS]
    facts = [(person, index) for person in people for index in relations]
    rng.shuffle(facts)

    sentences: list[str] = []
    questions: list[Question] = []
    total = 0
    while facts:
        stated: list[tuple[str, int, str]] = []
        if rng.random() < 0.15 * variety and sentences:
            sentence = rng.choice(FILLERS)
        else:
            person, index = facts.pop()
            stated.append((person, index, unused_values[index].pop()))
            clauses = [_clause(rng, *stated[0], variety)]
            second = next((fact for fact in facts[-12:] if fact[0] == person), None)
            if second is not None and rng.random() < 0.4 * variety:
                facts.remove(second)
                stated.append((person, second[1], unused_values[second[1]].pop()))
                clauses.append(_clause(rng, *stated[1], variety).removeprefix(person + " "))
            sentence = " and ".join(clauses) + "."
            if rng.random() < 0.15 * variety:
                sentence = f"{rng.choice(OPENINGS)}, {sentence}"
        total += length(" " + sentence)
        if total > target_length and sentences:
            break
        sentences.append(sentence)
        for person, index, value in stated:
            questions.extend(_questions(person, index, value))
        if any(not values for values in unused_values):
            break
    rng.shuffle(questions)
    return Story(" ".join(sentences), tuple(questions))


def _clause(rng: Random, person: str, index: int, value: str, variety: float) -> str:
    relation = RELATIONS[index]
    wording = rng.choice(relation.statements) if rng.random() < variety else relation.statements[0]
    return wording.format(p=person, v=relation.noun(value))


def _questions(person: str, index: int, value: str) -> tuple[Question, Question]:
    relation = RELATIONS[index]
    words = {"p": person, "v": relation.noun(value)}
    answer = relation.statements[0].format(**words) + "."
    return (
        Question(relation.ask_value.format(**words), answer, (person, value), value),
        Question(relation.ask_person.format(**words), answer, (person, value), person),
    )
