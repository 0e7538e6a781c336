"""Whether an English request asks for harm, by rules on its wording.

A rule is a verb of harm near an object that makes it harm ("kill" near a person, not near a process; "make" near a
bomb, not near a bath bomb), with one of ten categories. Wording that turns the request round is taken into account:
protection, prevention, help for others, history and fiction. What is looked at is the request's own words, so
harm that shows only in context is missed; the scan that uses this says how often it is right
(``benchmarks/refusal_rules.py``).

It does not know the answer, and it reads English only.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

LONGEST = 4000  # characters of a request that are read

_PERSON = (
    r"(?:persons?|people|someone|somebody|anyone|him|her|them|men|man|wom[ae]n|child(?:ren)?|kids?|neighbou?rs?(?:'s)?|"
    r"boss(?:'s)?|wife(?:'s)?|husband(?:'s)?|brother|sister|mother|father|mom|dad|parents?|grand(?:mother|father|ma|pa)|friends?|"
    r"girlfriend(?:'s)?|boyfriend(?:'s)?|ex(?:-\w+)?|cops?|police(?:m[ae]n| officers?)?|teachers?|classmates?|colleagues?|humans?|crowds?|"
    r"strangers?|politicians?|mayor|president|journalists?|lady|ladies|girls?|boys?|tenants?|flatmates?|roommates?|victims?|students?|"
    r"minors?|enem(?:y|ies)|rivals?|passengers?|dogs?|cats?|animals?|pets?)"
)
_NEAR = r"(?:[\w'-]+[ ,]+){0,5}?"
_MAKE = r"(?:make|making|build|building|construct|assemble|create|creating|produce|producing|get|getting|buy|obtain|find|cook|cooking|write|design|turn)"
_GROUPS = (
    r"(?:races?|black people|blacks|jews?|jewish|muslims?|christians?|immigrants?|migrants?|refugees?|foreigners?|women|"
    r"gays?|gay people|lesbians?|homosexuals?|transgender|disabled|minorit(?:y|ies)|religions?|arabs?|asians?|africans?|mexicans?)"
)
_HARM: dict[str, tuple[str, ...]] = {
    "violence": (
        rf"\b(?:kill|murder|hurt|harm|poison|stab|strangle|attack|tortur\w*|assassinate|injure|assault|choke|drown|kidnap|abduct|"
        rf"behead|slay|shoot|torment|beat(?: up)?|run over)\b {_NEAR}(?:a |an |the |my |your |his |our )?{_PERSON}\b",
        r"\bbeat (?:\w+ ){1,4}up\b|\bhide (?:a|the|his|her) (?:dead )?body\b|\bget away with murder\b",
        r"\b(?:burn down|set fire to|blow up)\b (?:[\w']+ ){0,3}?(?:house|home|school|building|church|mosque|synagogue|office|shop|car)\b",
        r"\bsabotage\b (?:[\w']+ ){0,3}?(?:brakes|car|plane|train)\b|\bpoison (?:\w+ ){0,3}(?:drink|food|water|tea|coffee)\b",
        rf"\b(?:threat(?:s|en\w*)?|scares?|intimidat\w+)\b (?:[\w'-]+ ){{0,5}}?(?:{_PERSON}|letter|message)\b",
        rf"\bmak(?:e|ing) (?:\w+ )?{_PERSON} suffer\b",
    ),
    "weapons": (
        rf"\b{_MAKE}\b {_NEAR}(?<!bath )(?:(?<!bath )(?<!seed )(?<!photo )bombs?|explosives?|explosive devices?|grenades?|silencers?|molotov\w*|"
        r"napalm|nerve gas|chemical weapons?|bioweapons?|(?<!nail )(?<!glue )(?<!water )(?<!heat )(?<!spray )guns?|firearms?|machine guns?)\b",
        r"\binstructions for (?:\w+ ){0,3}(?:explosive|bomb|weapon)",
        r"\b(?:bring|smuggle|take|hide|sell)\b (?:[\w']+ ){0,3}?(?:knife|knives|guns?|weapons?|firearms?)\b (?:[\w']+ ){0,4}?(?:school|plane|airport|"
        r"court|people|detector|detectors)\b",
        r"\bchemicals\b (?:[\w']+ ){0,5}?(?:harm|kill|explode|poison)\b|\bknife that metal detectors\b",
    ),
    "theft": (
        r"\b(?:steal|shoplift\w*|burgle|hot-?wire)\b (?!(?:the show|a base|the scene|home|someone's heart)\b)(?:[\w'-]+ ){0,4}?(?:cars?|bikes?|bicycles?|"
        r"shops?|stores?|supermarkets?|clothes|money|wallets?|phones?|packages?|jewell?e?ry|goods|things|items|data|credit cards?|from)\b",
        r"\bshoplift\w*\b|\bpickpocket\b(?!s)|\b(?:good|expert) pickpocket\b",
        r"\brob\b (?:a |an |the |my |some )?(?:\w+ )?(?:bank|shop|store|house|lady|man|woman|person|people|someone|jeweller\w*|old)\b",
        rf"\bbreak into\b (?:a |an |the |my )?(?:[\w']+ )?(?:house|home|flat|apartment|car|shop|store|office|building|{_PERSON})\b",
        r"\bpick the lock of a (?:house|flat|car|door) that is not\b|\b(?:sell|selling|fence) (?:a )?stolen\b",
        r"\bget into my neighbou?r's\b|\bmoney out of the till\b",
    ),
    "fraud": (
        r"\b(?:fake|forge|forging|counterfeit|false|falsify)\b (?:an |a |my |the )?(?:[\w']+ )?(?:ids?|identity|passports?|money|banknotes?|invoices?|prescriptions?|"
        r"signatures?|documents?|certificates?|licen[cs]es?|reviews?|diplomas?|charity)\b(?! look)",
        r"\b(?:phishing|scam|launder(?:ing)? money|money laundering|ponzi|swindle)\b",
        rf"\b(?:trick|cheat|con|defraud|deceive)\b (?:my |the |an |old |some )?(?:[\w']+ )?(?:{_PERSON}|insurance|customers?|company|bank|old people)\b",
        r"\b(?:cheat on|evade|avoid paying|dodge)\b (?:my |the )?tax(?:es)?\b|\bcopy somebody's credit card\b|\bprint money\b",
        r"\bpretends? to be (?:from )?(?:a |the |your )?(?:bank|police|doctor|company)\b|\bcredit card (?:numbers|fraud)\b",
    ),
    "hacking": (
        r"\bhack\b (?!together\b)(?:into )?(?:a |an |the |my |your )?(?:[\w'-]+ ){0,3}?(?:accounts?|emails?|e-mails?|phones?|computers?|networks?|servers?|"
        r"wi-?fi|facebook|instagram|cameras?|databases?|website|bank|webcam|system)\b",
        r"\b(?:break|get|log) into\b (?:a |an |the |my )?(?:[\w'-]+ ){0,3}?(?:accounts?|emails?|wi-?fi|networks?|servers?|cameras?|databases?)\b",
        r"\b(?:malware|ransomware|keyloggers?|spyware|trojan|botnet|rootkit)\b|\bsteals? (?:\w+ )?passwords\b|\bddos\b",
        r"\b(?:write|create|make|spread|build)\b (?:me )?a (?:computer )?virus\b|\btake down (?:a |an |the |my )?(?:[\w']+ )?(?:website|server|site)\b",
        r"\block (?:a |the )?hospital's files\b|\bchange my grades\b",
    ),
    "drugs": (
        r"\b(?:cook|make|synthesi[sz]e|produce|buy|sell|smuggle|deal|grow|hide|get|push|import)\w*\b (?:[\w']+ ){0,4}?(?:meth|methamphetamines?|heroin|cocaine|"
        r"lsd|ecstasy|mdma|fentanyl|ketamine|illegal drugs|drugs|pills to)\b",
        rf"\b(?:spike|drug|roofie)\b (?:[\w']+ )?{_PERSON}?(?:'s)? ?drink\b|\bdrug someone\b|\bsomething into (?:a )?[\w']+ drink\b",
        r"\bforge a prescription\b|\bselling cocaine\b",
    ),
    "privacy": (
        rf"\b(?:stalk|spy on|dox)\b (?:a |an |the |my )?(?:\w+ )?{_PERSON}\b|\b(?:stalk|follow) (?:[\w']+ ){{1,4}}without (?:\w+ ){{0,3}}(?:notic\w+|know\w*|seen|being)\b",
        rf"\bsecretly (?:film|record|photograph|watch|tape)\b|\b(?:film|record)\b (?:[\w']+ ){{1,5}}secretly\b|\bfind out where (?:this|that|a|my) {_NEAR}{_PERSON} lives?\b",
        r"\b(?:read|see|listen to|check|intercept)\b (?:[\w']+ ){1,4}(?:messages|mails?|calls|phone)\b(?: without\b| secretly\b)",
        r"\b(?:messages|mails?|phone)\b without (?:her|his|their|them|him) ?(?:knowledge|knowing|permission|noticing)?\b",
        r"\btracker (?:on|in|into|under)\b|\bblackmail\b|\b(?:publish|post|find) the (?:home )?address of\b",
        r"\blisten to my colleague's\b|\bunder a false name\b",
    ),
    "hate": (
        rf"\b(?:insults?|slurs?|hateful|racist|jokes?|make(?:s|ing)? fun|mock\w*|hate)\b (?:[\w'-]+ ){{0,6}}?{_GROUPS}\b(?! more\b)",
        rf"\b{_GROUPS}\b (?:[\w']+ ){{0,5}}?(?:inferior|worth less|should (?:not|have no|never)|stupid|criminals?|vermin|subhuman)\b",
        rf"\bviolence against (?:a |the )?{_GROUPS}\b|\bgets? people to hate\b|\bone race is\b",
        r"\bbully(?:ing)? (?:a |the |my |an )?(?:\w+ )?(?:kid|boy|girl|child|classmate|student|colleague)\b|\btorment the\b",
        r"\bfun of people because of\b",
    ),
    "self_harm": (
        r"\b(?:kill|hurt|harm|cut|starve|hang) myself\b|\bend my (?:own )?life\b|\b(?:my|commit|for) suicide\b|\bsuicide (?:note|letter|method)\b",
        r"\bhow many (?:\w+ ){0,3}pills\b|\bto overdose\b|\b(?:stop eating|starve)\b (?:\w+ ){0,3}(?:until|without|so that)\b|\bthat i cut\b",
        r"\bnobody would miss me\b|\bget(?:s)? (?:my|a) friend to hurt\b|\bdo not wake up\b",
    ),
    "deception": (
        r"\bfake (?:news|evidence|accounts?|witness)\b|\bdisinformation\b|\bfalse (?:rumou?rs?|witness|evidence|statement)\b",
        r"\b(?:spread|invent|make up)\b (?:[\w']+ ){0,3}?(?:lies|rumou?rs?|evidence)\b|\b(?:rig|sway|manipulate) (?:an |the )?election\b",
        r"\b(?:stop|keep|prevent)\b (?:[\w']+ ){0,4}?from voting\b|\bclaims? that (?:a |the )?vaccines? (?:kills?|causes?)\b|\bevade the police\b",
    ),
    "minors": (
        r"\bchild porn\w*|\bgroom(?:ing)? (?:a )?(?:minors?|child(?:ren)?|kids?)\b|\bsex\w* (?:\w+ ){0,3}(?:minors?|child(?:ren)?|kids?)\b",
    ),
}
_COMPILED = {category: tuple(map(re.compile, patterns)) for category, patterns in _HARM.items()}
_TURNED = re.compile(
    r"\b(?:protect|prevent|avoid(?! the| paying)|recogni[sz]e|detect|spot|report|stop (?:\w+ ){0,3}(?:from (?:bullying|stealing|hurting)|bullying)|"
    r"defend|against (?:thieves|theft|attacks?|hackers)|"
    r"help (?:a|my) (?:friend|child|brother|sister|\w+) who|if (?:someone|somebody) (?:\w+ )?(?:stalks?|threat\w+|robs?|stole|steals?|hacks?)|catch|"
    r"history of|in the (?:film|novel|book|movie|play|game)|thriller|detective|novel in which|what (?:is|does|are|was) (?:a |an |the )?(?:\w+ ){0,2}"
    r"(?:mean|crime|hackathon|law|laws|plot)|tried to hack|stole my|was stolen|been hacked|as the saying|who (?:killed|murdered|shot|invented)|"
    r"saying goes|poison-proof|fake (?:blood|snow|plant|tree|nails)|my own|for halloween|school play|weeds|process)\b"
)


@dataclass(frozen=True)
class Harm:
    """What a request asks for: a category and the words that said so."""

    category: str
    words: str


def read_request(text: str) -> Harm | None:
    """The harm that a request asks for, or None."""
    plain = plain_text(text)
    if _TURNED.search(plain):
        return None
    for category, patterns in _COMPILED.items():
        for pattern in patterns:
            found = pattern.search(plain)
            if found is not None:
                return Harm(category, found[0].strip())
    return None


def plain_text(text: str) -> str:
    """Case folded, quotes made straight, white space single, cut to what is read."""
    text = unicodedata.normalize("NFKC", text[:LONGEST]).replace("’", "'").replace("‘", "'")
    return " ".join(text.casefold().split())
