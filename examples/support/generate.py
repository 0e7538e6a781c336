"""Writes tickets.jsonl: customer messages of a made-up online shop, each with one of twelve intents.

Every request is one of nine phrasings of its intent, so train and test share phrasings, as canned forms of a shop
would: a high score here says that the pipeline works, not that it will do as well on free text.

A customer has a name, a tone and a way of typing, and writes one to three messages. A message is built from parts
(greeting, remark, request, detail, closing) with slot words, then roughened with slips of the keyboard. Remarks
mention other business on purpose ("my last refund came quickly"), so single words do not give the intent away.

The same Python or another gives the same bytes: only ``Random.random`` is used, whose sequence is guaranteed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

ROWS = 600
SEED = 20

SLOTS = {
    "item": (
        "desk lamp,walnut side table,linen duvet cover,cast iron pan,wool blanket,coffee grinder,floor mirror,"
        "bath mat,set of six wine glasses,standing fan,kids' bunk bed,bread bin,wall clock,garden chair,"
        "knife block,reading chair,picture frame,shower curtain,electric kettle,rug,shoe rack,cushion cover"
    ),
    "colour": "grey,dark green,navy,cream,rust,black,pale blue,oak,white,mustard",
    "day": (
        "on Monday,last Tuesday,on the 3rd,two weeks ago,on the 14th of May,on Friday night,yesterday,this morning,"
        "at the end of March,last weekend,on June 9,ten days ago,just before Easter,on the 27th"
    ),
    "since": (
        "Monday,last Tuesday,the 3rd,the 14th of May,Friday night,yesterday,this morning,the end of March,"
        "last weekend,June 9,Easter,the 27th"
    ),
    "soon": "Friday,the weekend,Thursday noon,the 20th,next week,the end of the month,Sunday,July 1,Christmas",
    "span": "three days,a week,nearly two weeks,ten days,over a month,six working days,two weekends,nine days",
    "price": "£18,£24.90,£36,£49.50,£62,£75,£89,£112.40,£140,£219,£310",
    "place": (
        "Leeds,Bristol,Dundee,Cork,Norwich,Swansea,Bath,Derby,Exeter,Belfast,York,Truro,Perth,Hull,"
        "Lincoln,Cardiff,Inverness,Luton"
    ),
    "street": (
        "Mill Lane,Station Road,Harbour Street,Oak Avenue,Church Walk,Queen's Terrace,Park Row,Elm Close,"
        "Bridge Street,Hill View,Abbey Road,Canal Side"
    ),
    "carrier": "the courier,your driver,the post office,Parcelway,the delivery firm,SwiftVan,the depot",
    "card": "Visa card,debit card,Mastercard,PayPal account,credit card,gift card,bank account",
    "code": "SPRING15,WELCOME10,HOME20,FRIEND5,BANK25,THANKYOU,MOVE12,LOYAL8",
    "person": "my sister,my husband,a neighbour,my mum,our office,my flatmate,a friend,my wife,my dad,the landlord",
    "device": "phone,laptop,tablet,work computer,old iPad,Android app",
    "first_name": (
        "Amara,Ben,Chloe,Dai,Elena,Femi,Grace,Hugo,Imran,Jess,Kofi,Lena,Marek,Nadia,Owen,Priya,Quentin,Rosa,Sam,Tess,"
        "Uma,Viktor,Wen,Yusuf,Zoe"
    ),
    "count": "two,three,four,five,six,eight",
}

CODES = SLOTS["code"].split(",")  # stay in capitals

# Requests: what the customer wants. Several share words with those of other intents.
REQUESTS: dict[str, tuple[str, ...]] = {
    "refund_status": (
        "I sent the {item} back {day} and still see no money on my {card}",
        "you confirmed you got my return {span} ago, so when do I get the {price} back",
        "has the {price} for order {order} been paid out to my {card} yet",
        "it has been {span} since the return of the {item} was accepted and nothing has been credited",
        "your mail said five days for the money, we are at {span} now and my {card} shows nothing",
        "how far along is the repayment of {price} for the {item} I gave back",
        "only part of the amount for order {order} came back to me, where is the other {price}",
        "the order was cancelled {day} but the {price} has not reappeared on my {card}",
        "please check what is holding up my {price}, the {item} has been back in your warehouse since {since}",
    ),
    "return_request": (
        "the {item} does not suit the room and I would like to send it back",
        "how do I give back a {item} that I opened but never used",
        "I changed my mind about the {colour} {item}, please send me a label for it",
        "can I hand in the {item} at a shop in {place} instead of posting it and get my money",
        "is it too late to bring back something I bought {day}",
        "the {item} is fine but too big for us, what are the steps to get rid of it and be paid back",
        "I need a collection for the {item} from order {order}, we do not want to keep it",
        "{person} already owns the same {item}, so may this one go back to you unopened",
        "what box do I use and who pays the postage if I no longer want the {item}",
    ),
    "cancel_order": (
        "please stop order {order} before it goes out, I no longer need the {item}",
        "I bought the {item} twice by mistake {day}, take one of them off before you pack it",
        "is there still time to call off what I ordered {day}",
        "I found the {item} cheaper in {place}, so do not ship mine",
        "pressed buy too early, kindly scrap order {order} and release the {price}",
        "the {span} wait for the {item} is too long, I want out of this purchase",
        "can you withdraw my {item} order, the button for it is greyed out on my {device}",
        "do not send the {colour} {item}, {person} has just given me one",
        "nothing has shipped yet, so please drop the {item} from order {order}",
    ),
    "change_address": (
        "we moved, so order {order} has to go to {number} {street} in {place}",
        "I typed the wrong house number, it should be {number} {street}",
        "can the {item} go to {person} at {street} rather than to my flat",
        "please send my parcel to my work in {place} instead, nobody is home on weekdays",
        "my old postcode is still on order {order}, could you put in the new one for {place}",
        "from {soon} on I live at {number} {street}, please deliver there",
        "the checkout filled in where I used to live, make it {number} {street}, {place}",
        "is it possible to redirect the {item} to a pickup point near {street}",
        "you have my flat as {street} but it is {number} {street} now, correct that before it ships",
    ),
    "track_parcel": (
        "where is the {item} I bought {day}",
        "the link for order {order} has said in transit for {span}",
        "{carrier} says delivered but there is nothing at my door in {place}",
        "when will the {item} get here, I took {soon} off work for it",
        "could you tell me which day order {order} arrives in {place}",
        "it was meant to come {day} and I have heard nothing from {carrier} since",
        "my {item} seems stuck at a depot near {place}, is it moving at all",
        "I never got a number to follow order {order} with",
        "{span} and still no sign of the {item}, has it even left you",
    ),
    "damaged_item": (
        "the {item} came with a deep scratch right across the top",
        "one of the {count} pieces in the box was smashed when I opened it",
        "the box for order {order} was crushed and the {item} inside is cracked",
        "my {colour} {item} has a broken leg straight out of the packaging",
        "the {item} worked for {span} and then the switch fell off",
        "there is a big dent in the {item} that {carrier} brought {day}",
        "the seam of the {item} was torn open on arrival, can you replace it",
        "unpacked the {item} and found water stains and a split corner",
        "the {item} wobbles because a part is bent, I would like one that is whole",
    ),
    "wrong_item": (
        "I ordered a {item} but the parcel had a {item2} in it",
        "this is the {colour} one, and I asked for {colour2}",
        "you packed somebody else's {item}, the slip names a person in {place}",
        "my order was for {count} but only one {item} was in the box",
        "the {item} you sent is a different size from the one on my confirmation",
        "opened order {order} and got a {item2}, that is not what I paid {price} for",
        "there has been a mix-up, {carrier} left me a {item2} instead of the {item}",
        "I got a {colour} {item}, my receipt clearly says {colour2}",
        "the label on the box is right but what is inside is a {item2}",
    ),
    "payment_problem": (
        "my {card} was charged twice for order {order}",
        "checkout refuses my {card} although there is enough money on it",
        "{price} left my {card} {day} but the site says the order does not exist",
        "I keep getting an error at the last step when I try to pay {price} for the {item}",
        "why did you take {price} when the basket said less",
        "the bank approved it and your page still says pending after {span}",
        "the pay button does nothing on my {device}, I have tried {count} times",
        "there are {count} bookings of {price} on my statement from you and I bought one {item}",
        "your site wants a code from my bank for the {price} and then just hangs",
    ),
    "discount_code": (
        "{code} is not accepted for the {item} in my basket",
        "I forgot to enter {code} when I bought the {item}, can you still take it off",
        "your newsletter promised me money off but the voucher says expired",
        "does {code} work together with the sale price of the {item}",
        "where do I type {code} on my {device}, I see no box for it",
        "the total stays at {price} after I put {code} in",
        "I was told {person} and I would both get a voucher for signing up and mine never came",
        "is there anything like a student offer on a {item}",
        "the {code} offer took nothing off order {order} and the deadline is {soon}",
    ),
    "stock_question": (
        "will the {colour} {item} be back any time soon",
        "do you have the {item} in your {place} shop, I would rather pick it up",
        "how many of the {item} are left, I need {count} for our office",
        "the {item} shows as sold out, can I be told when it returns",
        "is the {item} also made in {colour}",
        "are you going to sell the {item} again before {soon}",
        "I want to order {count} of the {item} but the page only lets me add one",
        "has the {colour} version of the {item} been dropped for good",
        "can I reserve a {item} that is on its way to your warehouse",
    ),
    "account_access": (
        "I cannot get in any more, the reset mail never arrives",
        "my password is rejected on my {device} since {since}",
        "it says my login is locked after {count} attempts",
        "I no longer have the mailbox I signed up with, how do I see my orders",
        "the code you text me to sign in comes too late every time",
        "someone in {place} has logged in as me, please close that off",
        "the site keeps throwing me out on my {device} before I reach my orders",
        "please change the email I sign in with, the old one is gone since {since}",
        "I have two profiles by accident and cannot open the one with order {order}",
    ),
    "invoice_copy": (
        "I need a bill with VAT for order {order} for my tax return",
        "where can I download the paperwork for the {item}",
        "could you issue the receipt in the name of our company in {place}",
        "my accountant wants a document for the {price} I paid {day}",
        "the receipt for order {order} has no tax number on it, please send a proper one",
        "please mail me proof of purchase for the {item}, {person} threw the paper away",
        "can I have last year's bills as one file, I count {count} orders",
        "the PDF for order {order} will not open on my {device}, send it again",
        "I need something official that shows the {price} for the {item}, for my insurance",
    ),
}

# Remarks often name other business; each has the intents that it would contradict. Details fit any request.
REMARKS: tuple[tuple[str, str], ...] = (
    ("The refund for my last order came quickly, so I know you can do it.", ""),
    ("I returned a {item2} in spring and that went well.", ""),
    ("I already updated my address last year, that part is right.", "change_address"),
    ("Payment went through without trouble.", "payment_problem"),
    ("The parcel itself arrived on time.", "track_parcel cancel_order change_address stock_question"),
    ("I have been a customer since {year}.", ""),
    ("I used {code} on this one and it worked.", "discount_code stock_question account_access"),
    ("Your chat told me to write here.", ""),
    ("I called {day} and waited half an hour.", ""),
    ("This is about something I bought for {person}.", "stock_question account_access"),
    ("No need to replace or cancel anything else.", "cancel_order"),
    ("I can log in fine and see everything in my account.", "account_access track_parcel"),
    ("I paid {price} with my {card}.", "payment_problem stock_question account_access"),
    ("Not sure if this is the right place to ask.", ""),
    ("I have the invoice and the tracking page in front of me.", "invoice_copy track_parcel stock_question"),
    ("We are redecorating the house in {place}.", ""),
    ("My other order with the {item2} is fine, leave that as it is.", ""),
    ("I do not want a voucher as an answer.", "discount_code"),
    ("{person_cap} said you were helpful last time.", ""),
    ("The {item2} I got from you was lovely, nothing broken or missing there.", ""),
)
DETAILS = (
    "My order number is {order}.",
    "It is order {order} from {since}.",
    "The name on it is {name}.",
    "I am in {place}, if that matters.",
    "I need to know by {soon}.",
    "Photos are attached.",
    "You can phone me after six.",
    "I wrote about this {day} already.",
    "It is meant as a present.",
    "I leave for {place} before {soon}.",
)
GREETINGS = {
    "polite": ("Hello,", "Good morning,", "Dear team,", "Hi there,", "Good evening,", ""),
    "plain": ("Hi,", "Hello,", "", "", "Hey,"),
    "angry": ("", "", "Hello???", "To whoever reads this:", "Seriously,"),
}
CLOSINGS = {
    "polite": ("Many thanks, {name}", "Thank you in advance!", "Kind regards, {name}", "Thanks for your help.", ""),
    "plain": ("Thanks", "{name}", "", "", "Cheers"),
    "angry": (
        "This is not good enough.",
        "I expect an answer today.",
        "Not impressed at all.",
        "Sort it out.",
        "",
        "What a mess.",
        "Never again.",
    ),
}
SHORTHAND = {"please": "pls", "you": "u", "because": "bc", "thanks": "thx", "before": "b4", "tomorrow": "tmrw"}


class Writer:
    """Draws every choice from one seeded sequence."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def pick(self, options: Sequence[str]) -> str:
        return options[self.below(len(options))]

    def chance(self, share: float) -> bool:
        return self.random() < share

    def fill(self, text: str, fixed: dict[str, str]) -> str:
        """Replace each ``{slot}`` by a word; ``{item2}`` is another word than ``{item}``."""

        def word(match: re.Match[str]) -> str:
            slot = match[1]
            if slot in fixed:
                return fixed[slot]
            kind = slot.rstrip("2")
            if kind == "number":
                return str(1 + self.below(180))
            if kind == "year":
                return str(2012 + self.below(12))
            if slot == "person_cap":
                value = self.pick(SLOTS["person"].split(","))
                return value[0].upper() + value[1:]
            return self.pick([v for v in SLOTS[kind].split(",") if v != fixed.get(kind)])

        return re.sub(r"\{(\w+)\}", word, text)

    def message(self, intent: str, customer: dict[str, str], requests: dict[str, int]) -> str:
        tone = customer["tone"]
        fixed = {slot: self.pick(SLOTS[slot].split(",")) for slot in ("item", "colour", "day")}
        fixed |= {"name": customer["name"], "order": self.order()}
        options = REQUESTS[intent]
        number = requests[intent] = requests[intent] + 1  # every request is used about equally often
        request = self.fill(options[number % len(options)], fixed)
        asks = re.match(r"(where|when|how|has|is|can|could|will|do you|does|are|why|what|may)\b", request)
        if tone == "polite" and self.chance(0.35):
            request = self.pick(("I hope you can help: ", "A short question: ", "Sorry to trouble you, but ")) + request
        request = request[0].upper() + request[1:] + ("?" if asks else "." if tone != "angry" else self.pick("!."))
        middle = [request]
        if self.chance(0.45):
            remark = self.pick([text for text, not_with in REMARKS if intent not in not_with.split()])
            middle.insert(self.below(2), self.fill(remark, fixed))
        if self.chance(0.3):
            middle.append(self.fill(self.pick(DETAILS), fixed))
        greeting = self.pick(GREETINGS[tone])
        if greeting.endswith(",") and middle[0].split()[0].isalpha() and middle[0].split()[0] not in ("I", *CODES):
            middle[0] = middle[0][0].lower() + middle[0][1:]
        parts = [greeting, *middle, self.fill(self.pick(CLOSINGS[tone]), fixed)]
        return " ".join(part for part in parts if part)

    def order(self) -> str:
        return f"{self.pick(('', '#', 'MF-'))}{10000 + self.below(90000)}"

    def roughen(self, text: str, slips: float, lower: bool, tone: str) -> str:
        words = text.split(" ")
        for i, word in enumerate(words):
            if word.lower() in SHORTHAND and lower and self.chance(0.5):
                words[i] = SHORTHAND[word.lower()]
            elif word.isalpha() and len(word) > 4 and self.chance(slips):
                at = 1 + self.below(len(word) - 3)
                words[i] = self.pick(
                    (
                        word[:at] + word[at + 1] + word[at] + word[at + 2 :],  # two letters swapped
                        word[:at] + word[at + 1 :],  # one missing
                        word[:at] + word[at] + word[at:],  # one doubled
                    )
                )
            elif tone == "angry" and word.isalpha() and len(word) > 3 and self.chance(0.06):
                words[i] = word.upper()
        text = " ".join(words)
        if lower:
            text = text.lower().replace("'", "").rstrip(".")
        return text


def pieces(text: str) -> set[str]:
    """The 5-character pieces of a text without case and signs."""
    text = " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())
    return {text[i : i + 5] for i in range(len(text) - 4)}


def tickets(rows: int = ROWS, seed: int = SEED) -> list[dict[str, str]]:
    """``rows`` messages, as even over the intents as the count allows; none nearly equals another."""
    writer = Writer(seed)
    intents = list(REQUESTS)
    requests = dict.fromkeys(intents, 0)
    before: dict[str, list[set[str]]] = {intent: [] for intent in intents}
    deck: list[str] = []
    found: list[dict[str, str]] = []
    customers = 0
    while len(found) < rows:
        customers += 1
        customer = {
            "name": writer.pick(SLOTS["first_name"].split(",")),
            "tone": writer.pick(("polite", "plain", "plain", "angry")),
        }
        slips, lower = writer.pick(("0", "0", "0.02", "0.05")), writer.chance(0.25)
        for _ in range(min(1 + writer.below(3), rows - len(found))):
            deck = deck or sorted(intents, key=lambda _: writer.random())
            intent = deck.pop()
            while True:
                text = writer.message(intent, customer, requests)
                text = writer.roughen(text, float(slips), lower, customer["tone"])
                new = pieces(text)
                alike = any(len(new & old) > 0.7 * len(new | old) for old in before[intent])
                if 8 <= len(text.split()) <= 40 and not alike:
                    break
            before[intent].append(new)
            found.append({"prompt": text, "completion": intent, "customer": f"C{customers:04d}"})
    return found


def main() -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in tickets()]
    (Path(__file__).parent / "tickets.jsonl").write_bytes("".join(lines).encode("utf-8"))


if __name__ == "__main__":
    main()
