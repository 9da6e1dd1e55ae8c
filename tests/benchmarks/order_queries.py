"""Writes the queries and the examples of the recipe `order`, the same ones every time.

python -m tests.benchmarks.order_queries FOLDER

Every message says who orders, where from, what, and how many. Names, cities and items of one split
are in no other and in no example; the messages of the split `wordings` are worded as no other is.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

NAMES = """
Abel, Ada, Adele, Aisha, Alma, Amir, Anita, Anton, Aria, Arno, Bela, Ben, Bianca, Boris, Brenda,
Bruno, Carla, Cedric, Clara, Cyrus, Dana, Daria, David, Delia, Diego, Dora, Edgar, Edith, Elena,
Elias, Emil, Erik, Esther, Eva, Fabio, Farid, Felix, Fiona, Flora, Frank, Gail, Gemma, Gina,
Grace, Greta, Gustav, Hana, Harold, Heidi, Helen, Hugo, Ida, Igor, Ines, Irene, Iris, Isaac, Ivan,
Jack, Jana, Jasper, Joan, Jonas, Julia, Kai, Karen, Karl, Kira, Lars, Laura, Leah, Leo, Lena,
Lily, Lionel, Lola, Louis, Lucia, Lydia, Mabel, Magda, Marco, Maria, Martin, Maya, Mia, Milo,
Mina, Mona, Nadia, Naomi, Nelly, Nina, Noah, Nora, Odette, Olga, Oliver, Omar, Oscar, Otto, Pablo,
Paula, Pedro, Peter, Petra, Philip, Quinn, Rachel, Ralph, Ravi, Rita, Robin, Rosa, Ruth, Sally,
Samir, Sandra, Sara, Selma, Simon, Sofia, Stella, Sven, Tamara, Tara, Theo, Thomas, Tilda, Toni,
Ulla, Uma, Vera, Victor, Viola, Walter, Wanda, Wendy, Willa, Xenia, Yara, Yusuf, Yvonne, Zara,
Zelda, Zeno
"""
CITIES = """
Accra, Amman, Athens, Auckland, Austin, Bali, Bamako, Baku, Bergen, Berlin, Bern, Bogota, Boston,
Bristol, Brussels, Cairo, Calgary, Cardiff, Chicago, Cologne, Cork, Dakar, Dallas, Delhi, Denver,
Dover, Dubai, Dublin, Durban, Fargo, Florence, Geneva, Genoa, Ghent, Glasgow, Graz, Hamburg,
Hanoi, Havana, Helsinki, Houston, Jakarta, Kiel, Kyoto, Lagos, Leeds, Leipzig, Lima, Lisbon,
London, Lyon, Madrid, Malta, Manila, Marseille, Memphis, Miami, Milan, Montreal, Munich, Nairobi,
Naples, Nice, Oslo, Ottawa, Oxford, Palermo, Paris, Perth, Porto, Prague, Quito, Riga, Rome,
Salem, Seattle, Seoul, Seville, Sydney, Tallinn, Tampa, Tokyo, Toledo, Toronto, Tunis, Turin,
Utrecht, Valencia, Venice, Vienna, Vilnius, Warsaw, York, Zagreb, Zurich
"""
ITEMS = """
apple crates, armchairs, baking trays, balloons, bath towels, batteries, bed sheets, bicycle
pumps, birthday cards, blankets, blue pens, board games, bookends, books, bottle openers, bread
knives, brooms, bunk beds, candles, camping stoves, cat baskets, chess sets, clay pots, coat
hooks, coffee cups, combs, cooking pots, cork boards, curtains, cushions, desk lamps, dinner
plates, dog leads, door mats, door stops, drawing pins, egg cups, envelopes, erasers, extension
cords, face masks, feather dusters, fishing nets, flags, flower pots, folding chairs, frying pans,
garden gnomes, garden hoses, gift boxes, glass bowls, glue sticks, hair clips, hammers, hand
soaps, hats, headphones, honey jars, ice trays, ink bottles, jackets, jigsaw puzzles, keyboards,
kitchen scales, kites, ladders, lemon squeezers, light bulbs, lunch boxes, maps, measuring tapes,
milk jugs, mirrors, mixing bowls, mops, mugs, napkins, notebooks, oil lamps, oven gloves, paint
brushes, paper bags, party hats, pencil cases, picnic baskets, pillows, plant stands, playing
cards, quilts, rain coats, reading glasses, rolling pins, rubber boots, rugs, rulers, salad bowls,
scarves, school bags, scissors, screwdrivers, shoe racks, shopping bags, shower curtains, silver
spoons, sleeping bags, slippers, snow shovels, socks, soup bowls, stamps, step stools, storage
boxes, sun hats, suitcases, tablecloths, table lamps, tea kettles, tennis balls, tents, toasters,
tool boxes, torches, toy cars, umbrellas, vases, wall clocks, washing lines, watering cans, wine
glasses, wool hats, wooden spoons, yoga mats
"""
WORDINGS = (
    "Hi, this is {name} from {city}. Please send me {quantity} {item}.",
    "{name} in {city} would like to order {quantity} {item}.",
    "Could you ship {quantity} {item} to {city}? My name is {name}.",
    "Order for {name}, {city}: {quantity} {item}.",
    "I'm {name} and I need {quantity} {item} delivered to {city}.",
    "We need {quantity} {item} at our shop in {city}. Thanks, {name}",
    "Hello! {quantity} {item} for {name} please, to be sent to {city}.",
    "My name is {name}, I live in {city}, and I want {quantity} {item}.",
    "Please put {quantity} {item} aside for {name}, who will come from {city}.",
    "{city} calling, {name} here: we are out of {item}, send {quantity}.",
    "Good morning, {name} speaking. I'd love to get {quantity} {item} sent to {city}.",
    "To {city}, please: {quantity} {item}. Regards, {name}",
)
NEW_WORDINGS = (
    "Can {name} still get {quantity} {item}? The address is in {city}.",
    "{quantity} {item}, and quickly! {name}, {city}",
    "It's {name} again. The office in {city} has run out, so another {quantity} {item} please.",
    "A customer named {name} asked for {quantity} {item}; they go to {city}.",
)
POOL, TRAINED, DEVELOPED, HELD_OUT, REWORDED = 30, 150, 30, 60, 32


def rows(
    split: str, count: int, wordings: Sequence[str], entities: Sequence[Sequence[str]], seed: str
) -> Iterator[dict[str, str]]:
    """Messages with what they say, wordings and entities in turns."""
    draw = random.Random(seed)
    names, cities, items = ([*draw.sample(some, len(some))] for some in entities)
    for place in range(count):
        said = {
            "name": names[place % len(names)],
            "city": cities[place % len(cities)],
            "item": items[place % len(items)],
            "quantity": str(draw.randint(2, 60)),
        }
        yield {
            "query": wordings[place % len(wordings)].format(**said),
            "reference": "; ".join(f"{key}: {value}" for key, value in said.items()),
            "group": said["name"].lower(),
            "split": split,
        }


def _listed(text: str) -> list[str]:
    return [" ".join(one.split()) for one in text.split(",")]


def main() -> None:
    """Share the entities out, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    draw = random.Random("order")
    lists = [draw.sample(some, len(some)) for some in map(_listed, (NAMES, CITIES, ITEMS))]
    shares = (0.13, 0.42, 0.1, 0.25, 0.1)  # of each list, for the five kinds of rows
    bounds = [sum(shares[:end]) for end in range(len(shares) + 1)]
    shown, *others = [
        [some[round(low * len(some)) : round(high * len(some))] for some in lists]
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    plan = [
        ("train", TRAINED, WORDINGS),
        ("validation", DEVELOPED, WORDINGS),
        ("test", HELD_OUT, WORDINGS),
        ("wordings", REWORDED, NEW_WORDINGS),
    ]
    found = [
        row
        for (split, count, wordings), entities in zip(plan, others, strict=True)
        for row in rows(split, count, wordings, entities, split)
    ]
    examples = [
        {"query": row["query"], "response": row["reference"]}
        for row in rows("", POOL, WORDINGS, shown, "examples")
    ]
    for name, lines in (("queries.jsonl", found), ("examples.jsonl", examples)):
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
