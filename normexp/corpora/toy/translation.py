"""A German-English corpus made up by a small grammar, for experiments that last a minute.

Every pair is derived from one clause structure, so the English sentence is a function of the
German one and a perfect model scores 100 BLEU. What such a model has to learn, beyond a lexicon
of some 350 words a side:

* word order: verb second after any fronted phrase (English keeps subject-verb-object), verb last
  in subordinate and relative clauses, infinitives and participles at the end of the clause;
* words in two pieces: `ruft ... an` is one English word, joined (`anruft`) in subordinate clauses;
* meaning carried by morphology: case decides who acts on whom (`Den Hund sieht Anna`) and
  whether `in` is "in" or "into", verb endings whether `sie` is "she" or "they";
* compounds: `Gartentisch` is "garden table"; test sentences hold compounds never seen in training;
* English of its own: do-support, irregular pasts and plurals, a/an.

Words follow Zipf's law, but no listed word is so rare that 20,000 sentences do not teach it.
"""

import re
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from normexp.corpora.toy.english import with_article_an, with_ed, with_s
from normexp.corpora.toy.zipf import Zipf

MIN_TOKENS, MAX_TOKENS = 4, 20  # on either side, punctuation included
NOMINATIVE, ACCUSATIVE, DATIVE, GENITIVE = range(4)
_TOKEN = re.compile(r"\w+|[^\w\s]")

# ------------------------------------------------------------------------------------- lexicon
# Most frequent word first. Left out on purpose, because their forms are ambiguous: nouns of the
# weak declension (`den Studenten` is one or many) and masculine nouns in -en whose plural looks
# the same (`den Kuchen`).

# singular gender plural, English singular [irregular plural]
PERSONS = """
Mann m Männer man men, Frau f Frauen woman women, Kind n Kinder child children,
Freund m Freunde friend, Mutter f Mütter mother, Vater m Väter father, Lehrer m Lehrer teacher,
Mädchen n Mädchen girl, Arzt m Ärzte doctor, Bruder m Brüder brother,
Schwester f Schwestern sister, König m Könige king, Königin f Königinnen queen,
Sohn m Söhne son, Tochter f Töchter daughter, Nachbarin f Nachbarinnen neighbour,
Schüler m Schüler pupil, Bäcker m Bäcker baker, Köchin f Köchinnen chef, Gast m Gäste guest,
Onkel m Onkel uncle, Tante f Tanten aunt, Dieb m Diebe thief thieves,
Richterin f Richterinnen judge, Gärtner m Gärtner gardener, Sänger m Sänger singer,
Malerin f Malerinnen painter, Fischer m Fischer fisherman fishermen, Fahrer m Fahrer driver,
Großmutter f Großmütter grandmother, Tänzerin f Tänzerinnen dancer, Baby n Babys baby
"""
ANIMALS = """
Hund m Hunde dog, Katze f Katzen cat, Pferd n Pferde horse, Vogel m Vögel bird,
Kuh f Kühe cow, Maus f Mäuse mouse mice, Schwein n Schweine pig, Schaf n Schafe sheep sheep,
Ente f Enten duck, Wolf m Wölfe wolf wolves, Huhn n Hühner chicken, Fuchs m Füchse fox
"""
THINGS = """
Buch n Bücher book, Tisch m Tische table, Auto n Autos car, Tür f Türen door,
Bild n Bilder picture, Stuhl m Stühle chair, Lampe f Lampen lamp, Tasche f Taschen bag,
Fenster n Fenster window, Brief m Briefe letter, Schlüssel m Schlüssel key, Uhr f Uhren clock,
Ball m Bälle ball, Fahrrad n Fahrräder bicycle, Hut m Hüte hat, Tasse f Tassen cup,
Glas n Gläser glass, Messer n Messer knife knives, Mantel m Mäntel coat, Kleid n Kleider dress,
Zeitung f Zeitungen newspaper, Schuh m Schuhe shoe, Bett n Betten bed, Flasche f Flaschen bottle,
Koffer m Koffer suitcase, Karte f Karten map, Hemd n Hemden shirt, Korb m Körbe basket,
Blume f Blumen flower, Schrank m Schränke cupboard, Telefon n Telefone phone,
Gabel f Gabeln fork, Löffel m Löffel spoon, Boot n Boote boat, Kiste f Kisten box,
Ring m Ringe ring, Teller m Teller plate, Decke f Decken blanket, Spiegel m Spiegel mirror,
Geschenk n Geschenke gift, Kerze f Kerzen candle, Topf m Töpfe pot, Geige f Geigen violin,
Klavier n Klaviere piano, Teppich m Teppiche carpet, Schirm m Schirme umbrella
"""
FOODS = """
Brot n Brote loaf loaves, Apfel m Äpfel apple, Ei n Eier egg, Suppe f Suppen soup,
Torte f Torten cake, Kartoffel f Kartoffeln potato potatoes, Birne f Birnen pear,
Tomate f Tomaten tomato tomatoes, Wurst f Würste sausage, Salat m Salate salad,
Zwiebel f Zwiebeln onion, Nuss f Nüsse nut
"""
PLACES = """
Haus n Häuser house, Stadt f Städte city, Garten m Gärten garden, Schule f Schulen school,
Küche f Küchen kitchen, Straße f Straßen street, Park m Parks park, Dorf n Dörfer village,
Bahnhof m Bahnhöfe station, Wald m Wälder forest, Zimmer n Zimmer room,
Kirche f Kirchen church, Markt m Märkte market, Hotel n Hotels hotel, Laden m Läden shop,
Theater n Theater theatre, Büro n Büros office, Schloss n Schlösser castle, Turm m Türme tower,
Bibliothek f Bibliotheken library, Hof m Höfe yard, Keller m Keller cellar,
Fabrik f Fabriken factory, Wiese f Wiesen meadow, Klinik f Kliniken clinic, Feld n Felder field
"""
# first part of a compound with its linking element, English
MODIFIERS = """
Haus house, Garten garden, Küchen kitchen, Kinder child, Holz wood, Stadt city, Wein wine,
Sommer summer, Papier paper, Schul school, Winter winter, Wald forest, Arbeits work,
Blumen flower, Kaffee coffee, Bahnhofs station
"""
NAMES = """
Anna, Paul, Maria, Peter, Lena, Max, Julia, Felix, Sophie, Jonas, Clara, Leon, Emma, Oskar,
Laura, Anton, Marta, Karl, Nina, Emil
"""
CITIES = "Berlin Berlin, Wien Vienna, München Munich, Hamburg Hamburg, Köln Cologne, Rom Rome"

# predicative form[/stem before an ending] English
ANIMATE_ADJECTIVES = """
alt old, jung young, klein small, groß big, müde/müd tired, glücklich happy, traurig sad,
krank sick, freundlich friendly, reich rich, arm poor, stark strong, klug clever, hungrig hungry,
faul lazy, mutig brave, nett nice, berühmt famous, nervös nervous, höflich polite, stolz proud,
wütend angry, zufrieden content, vorsichtig careful, schnell quick, langsam slow, leise/leis quiet,
laut loud, fleißig diligent, neugierig curious
"""
INANIMATE_ADJECTIVES = """
neu new, alt old, klein small, groß big, schön beautiful, rot red, teuer/teur expensive,
schwarz black, blau blue, billig cheap, grün green, schwer heavy, kaputt broken, sauber clean,
leicht light, kalt cold, gelb yellow, lang long, warm warm, schmutzig dirty, kurz short,
dunkel/dunkl dark, leer empty, hell bright, rund round, bunt colourful, breit wide, nass wet,
voll full, schmal narrow, trocken dry, weich soft, hart hard
"""

# infinitive third-person participle [irregular English past after the slash]. "+" ends a separable
# particle, "*" marks the auxiliary `sein`, "_" joins English words, the first of which inflects.
INTRANSITIVE = """
schlafen schläft geschlafen sleep/slept, arbeiten arbeitet gearbeitet work,
lachen lacht gelacht laugh, spielen spielt gespielt play, singen singt gesungen sing/sang,
auf+stehen steht gestanden* get_up/got_up, warten wartet gewartet wait,
tanzen tanzt getanzt dance, an+kommen kommt gekommen* arrive, weinen weint geweint cry,
ein+kaufen kauft gekauft shop/shopped, ein+schlafen schläft geschlafen* fall_asleep/fell_asleep,
sitzen sitzt gesessen sit/sat, auf+wachen wacht gewacht* wake_up/woke_up,
träumen träumt geträumt dream, weg+laufen läuft gelaufen* run_away/ran_away,
stehen steht gestanden stand/stood, fern+sehen sieht gesehen watch_television,
ab+fahren fährt gefahren* depart, auf+hören hört gehört stop/stopped,
lächeln lächelt gelächelt smile
"""
MOTION = """
gehen geht gegangen* go/went, kommen kommt gekommen* come/came, fahren fährt gefahren* drive/drove,
laufen läuft gelaufen* run/ran, reisen reist gereist* travel/travelled,
wandern wandert gewandert* hike
"""
# ... followed by the kinds of object: P(erson), A(nimal), T(hing), F(ood), L = place
TRANSITIVE = """
sehen sieht gesehen see/saw PATFL, kaufen kauft gekauft buy/bought TF,
suchen sucht gesucht look_for PAT, finden findet gefunden find/found PATF,
lieben liebt geliebt love PAL, besuchen besucht besucht visit PL,
lesen liest gelesen read/read T, an+rufen ruft gerufen call P, essen isst gegessen eat/ate F,
brauchen braucht gebraucht need PTF, auf+machen macht gemacht open T,
hören hört gehört hear/heard PA, kennen kennt gekannt know/knew PL,
fragen fragt gefragt ask P, nehmen nimmt genommen take/took TF, zu+machen macht gemacht close T,
tragen trägt getragen carry TF, schreiben schreibt geschrieben write/wrote T,
ein+laden lädt geladen invite P, malen malt gemalt paint PATL, holen holt geholt fetch TF,
vergessen vergisst vergessen forget/forgot PTF, ab+holen holt geholt collect PT,
verlieren verliert verloren lose/lost T, auf+räumen räumt geräumt tidy L,
waschen wäscht gewaschen wash AT, treffen trifft getroffen meet/met P,
füttern füttert gefüttert feed/fed A, mit+bringen bringt gebracht bring_along/brought_along TF,
verstehen versteht verstanden understand/understood P, putzen putzt geputzt clean TL,
verstecken versteckt versteckt hide/hid TF, kochen kocht gekocht cook F,
an+ziehen zieht gezogen put_on/put_on T, bauen baut gebaut build/built TL,
reparieren repariert repariert repair T
"""
DATIVE_VERBS = """
helfen hilft geholfen help PA, danken dankt gedankt thank P, folgen folgt gefolgt* follow PA,
antworten antwortet geantwortet answer P, zu+hören hört gehört listen_to P,
vertrauen vertraut vertraut trust PA, gratulieren gratuliert gratuliert congratulate P
"""
DITRANSITIVE = """
geben gibt gegeben give/gave TF, zeigen zeigt gezeigt show TF,
bringen bringt gebracht bring/brought TF, schicken schickt geschickt send/sent T,
verkaufen verkauft verkauft sell/sold TF,
zurück+geben gibt gegeben give_back/gave_back T, leihen leiht geliehen lend/lent T,
an+bieten bietet geboten offer TF
"""
# ... followed by the German preposition and its case
PREPOSITIONAL = """
warten wartet gewartet wait_for PA auf accusative,
denken denkt gedacht think_of/thought_of PL an accusative,
sprechen spricht gesprochen speak_with/spoke_with P mit dative,
lachen lacht gelacht laugh_about PA über accusative,
träumen träumt geträumt dream_of PAL von dative, spielen spielt gespielt play_with PAT mit dative
"""
CLAUSAL = """
sagen sagt gesagt say/said, wissen weiß gewusst know/knew, glauben glaubt geglaubt believe,
hoffen hofft gehofft hope, denken denkt gedacht think/thought,
vergessen vergisst vergessen forget/forgot
"""

TIMES = """
heute today, jetzt now, wieder again, am_Montag on_Monday, am_Freitag on_Friday,
abends in_the_evening, im_Sommer in_summer, am_Sonntag on_Sunday, im_Winter in_winter
"""
PAST_TIMES = "gestern yesterday, damals back_then, neulich recently"
FUTURE_TIMES = "morgen tomorrow, bald soon, später later"
FREQUENCIES = "oft often, immer always, nie never, manchmal sometimes, selten rarely"
MANNERS = """
gern gladly, schnell quickly, langsam slowly, leise quietly, laut loudly, allein alone,
vorsichtig carefully, heimlich secretly
"""
SUBORDINATORS = """
weil because, wenn if, obwohl although, während while, bevor before, nachdem after, damit so_that,
sobald as_soon_as
"""
COORDINATORS = "und and, aber but, oder or"
# and what is asked about, which the rest of the question does not mention
QUESTION_WORDS = "warum why reason, wann when time, wo where place"
# German, English, kinds of noun; with the dative
PLACE_PREPOSITIONS = """
in in L, auf on T, vor in_front_of LT, hinter behind LT, neben next_to LT, unter under T, bei near L
"""
COMPANION_PREPOSITIONS = "mit with dative, für for accusative, ohne without accusative"
OBJECT_PRONOUNS = {  # no feminine and no plural: `sie` would be "her" or "them"
    ACCUSATIVE: "ihn him, mich me, uns us, dich you",
    DATIVE: "ihm him, mir me, uns us, dir you",
}
POSSESSIVES = "mein my, sein his, unser our, dein your"
NUMERALS = "zwei two, drei three, vier four, fünf five, zehn ten"
QUANTIFIERS = "viel many, einig some"

# --------------------------------------------------------------------------------- inflection

CASES = {"accusative": ACCUSATIVE, "dative": DATIVE}
# Kinds of noun: P(erson), A(nimal), T(hing), F(ood), L = place.
ANIMATE, INANIMATE = "PA", "TFL"
PLURAL = "p"  # takes the place of a gender: German tells genders apart in the singular only
# Persons of the verb; the third index covers er, sie, es and every singular noun.
FIRST, SECOND, THIRD, THEY = range(4)

# One row per gender or plural, one form per case. The genitive of feminines and plurals is not
# generated: `der Frau` would be "of the woman" or "to the woman".
DEFINITE = {
    "m": ("der", "den", "dem", "des"),
    "f": ("die", "die", "der"),
    "n": ("das", "das", "dem", "des"),
    "p": ("die", "die", "den"),
}
# dies-, jed-
DETERMINER_ENDINGS = {
    "m": ("er", "en", "em", "es"),
    "f": ("e", "e", "er"),
    "n": ("es", "es", "em", "es"),
    "p": ("e", "e", "en"),
}
# ein, kein, mein, ...
EIN_ENDINGS = {
    "m": ("", "en", "em", "es"),
    "f": ("e", "e", "er"),
    "n": ("", "", "em", "es"),
    "p": ("e", "e", "en"),
}
ADJECTIVE_ENDINGS = {
    "weak": {
        "m": ("e", "en", "en", "en"),
        "f": ("e", "e", "en"),
        "n": ("e", "e", "en", "en"),
        "p": ("en", "en", "en"),
    },
    "mixed": {
        "m": ("er", "en", "en", "en"),
        "f": ("e", "e", "en"),
        "n": ("es", "es", "en", "en"),
        "p": ("en", "en", "en"),
    },
    "strong": {"p": ("e", "e", "en")},
}
CONTRACTIONS = {
    ("in", "dem"): "im", ("in", "das"): "ins", ("zu", "dem"): "zum", ("zu", "der"): "zur",
    ("von", "dem"): "vom", ("bei", "dem"): "beim",
}  # fmt: skip

HABEN = ("habe", "hast", "hat", "haben")
SEIN = ("bin", "bist", "ist", "sind")
SEIN_PAST = ("war", "warst", "war", "waren")
WERDEN = ("werde", "wirst", "wird", "werden")
BE = ("am", "are", "is", "are")
BE_PAST = ("was", "were", "was", "were")
DO = ("do", "do", "does", "do")
# German forms, English auxiliary or None, English verb that needs do-support (or None)
MODALS = (
    (("kann", "kannst", "kann", "können"), "can", None),
    (("muss", "musst", "muss", "müssen"), "must", "have"),  # `muss nicht`: does not have to
    (("will", "willst", "will", "wollen"), None, "want"),
    (("soll", "sollst", "soll", "sollen"), "should", None),
    (("darf", "darfst", "darf", "dürfen"), "may", None),
)


# A sentence to be written: German words, English words, final punctuation
Draft = tuple[list[str], list[str], str]


class Noun(NamedTuple):
    """A noun of the lexicon; `gender` is m, f or n, `kind` a letter as in the verbs' tables."""

    german: str
    gender: str
    german_plural: str
    english: str
    english_plural: str
    kind: str

    def form(self, gender: str, case: int) -> str:
        """German form; `gender` is the noun's own or PLURAL."""
        if gender == PLURAL:
            adds_n = case == DATIVE and not self.german_plural.endswith(("n", "s"))
            return self.german_plural + ("n" if adds_n else "")
        if case == GENITIVE and gender != "f":
            syllables = len(re.findall("[aeiouyäöü]+", self.german.lower()))
            return self.german + ("es" if syllables == 1 or self.german.endswith("s") else "s")
        return self.german


class Verb(NamedTuple):
    """A verb of the lexicon, with what it governs."""

    particle: str
    infinitive: str  # without the particle
    third: str  # without the particle
    participle: str
    perfect: tuple[str, ...]  # forms of haben or sein
    english: list[str]
    english_past: list[str]
    kinds: str
    preposition: str
    case: int

    def present(self, person: int) -> str:
        """German present without the particle."""
        regular = self.third.endswith("t")  # otherwise like `weiß`
        if person == THEY:
            return self.infinitive
        if person == THIRD or (person == FIRST and not regular):
            return self.third
        if person == FIRST:
            stem = self.infinitive.removesuffix("n")
            if stem.endswith("el"):
                return stem.removesuffix("el") + "le"
            return stem if stem.endswith("e") else stem + "e"
        stem = self.third.removesuffix("t")
        return stem + ("t" if stem.endswith(("s", "ß", "z")) else "st")


class Adjective(NamedTuple):
    """An adjective of the lexicon; `stem` is what endings are added to."""

    german: str
    stem: str
    english: str


class Phrase(NamedTuple):
    """A constituent in both languages.

    `person` inflects a verb it is the subject of; `gender` is that of its noun, or PLURAL; a
    `human` one may have a relative clause. A `light` phrase is a pronoun: German puts it before
    adverbs.
    """

    german: list[str]
    english: list[str]
    person: int = THIRD
    gender: str = ""
    human: bool = False
    light: bool = False


def _entries(table: str) -> list[list[str]]:
    return [entry.split() for entry in table.split(",")]


def _phrases(table: str) -> list[Phrase]:
    return [Phrase(german.split("_"), english.split("_")) for german, english in _entries(table)]


def _nouns(table: str, kind: str) -> list[Noun]:
    return [
        Noun(german, gender, plural, english, irregular[0] if irregular else with_s(english), kind)
        for german, gender, plural, english, *irregular in _entries(table)
    ]


def _verbs(table: str, object_case: int = ACCUSATIVE) -> list[Verb]:
    verbs = []
    for infinitive, third, participle, english, *government in _entries(table):
        particle, _, base = infinitive.rpartition("+")
        present, _, past = english.partition("/")
        first, *rest = present.split("_")
        kinds, preposition, case = [*government, "", "", ""][:3]
        verbs.append(
            Verb(
                particle,
                base,
                third,
                particle + participle.rstrip("*"),
                SEIN if participle.endswith("*") else HABEN,
                [first, *rest],
                past.split("_") if past else [with_ed(first), *rest],
                kinds,
                preposition,
                CASES.get(case, object_case),
            )
        )
    return verbs


def _adjectives(table: str) -> list[Adjective]:
    adjectives = []
    for german, english in _entries(table):
        form, _, stem = german.partition("/")
        adjectives.append(Adjective(form, stem or form, english))
    return adjectives


# The second argument grows with the list, so that its last items still occur often enough.
_NOUNS = {
    "P": Zipf(_nouns(PERSONS, "P"), 5),
    "A": Zipf(_nouns(ANIMALS, "A"), 5),
    "T": Zipf(_nouns(THINGS, "T"), 8),
    "F": Zipf(_nouns(FOODS, "F"), 5),
    "L": Zipf(_nouns(PLACES, "L"), 5),
    # owners, in the genitive
    "O": Zipf([noun for noun in _nouns(PERSONS, "P") if noun.gender != "f"], 5),
}
_MODIFIERS = Zipf([(german, english) for german, english in _entries(MODIFIERS)], 5)
_NAMES = Zipf([Phrase([name], [name]) for (name,) in _entries(NAMES)], 5)
_CITIES = Zipf(_phrases(CITIES), 4)
_ANIMATE_ADJECTIVES = Zipf(_adjectives(ANIMATE_ADJECTIVES), 6)
_INANIMATE_ADJECTIVES = Zipf(_adjectives(INANIMATE_ADJECTIVES), 6)
_VERBS = {
    "transitive": Zipf(_verbs(TRANSITIVE), 5),
    "intransitive": Zipf(_verbs(INTRANSITIVE), 5),
    "motion": Zipf(_verbs(MOTION), 4),
    "ditransitive": Zipf(_verbs(DITRANSITIVE), 4),
    "dative": Zipf(_verbs(DATIVE_VERBS, DATIVE), 4),
    "prepositional": Zipf(_verbs(PREPOSITIONAL), 4),
    "clausal": Zipf(_verbs(CLAUSAL), 3),
}
(_COPULA,) = _verbs("sein ist gewesen* be/was")
_FRAMES = Zipf(
    ["transitive", "intransitive", "copula", "motion", "ditransitive", "dative", "prepositional"], 1
)
_TENSES = Zipf(["present", "perfect", "modal", "future"], 1)
_MODALS = Zipf(MODALS, 3)
_TIMES = {
    "present": Zipf(_phrases(TIMES), 4),
    "perfect": Zipf(_phrases(TIMES + "," + PAST_TIMES), 4),
    "modal": Zipf(_phrases(TIMES + "," + FUTURE_TIMES), 4),
    "future": Zipf(_phrases(TIMES + "," + FUTURE_TIMES), 4),
}
_FREQUENCIES = Zipf(_phrases(FREQUENCIES), 3)
_MANNERS = Zipf(_phrases(MANNERS), 4)
_SUBORDINATORS = Zipf(_phrases(SUBORDINATORS), 3)
_COORDINATORS = Zipf(_phrases(COORDINATORS), 1)
_QUESTION_WORDS = Zipf(_entries(QUESTION_WORDS), 2)
_PLACE_PREPOSITIONS = Zipf(_entries(PLACE_PREPOSITIONS), 1)
_COMPANION_PREPOSITIONS = Zipf(_entries(COMPANION_PREPOSITIONS), 1)
_SUBJECT_PRONOUNS = Zipf(
    [
        Phrase([german], [english], person, light=True)
        for german, english, person in (
            ("er", "he", THIRD),
            ("sie", "she", THIRD),
            ("ich", "I", FIRST),
            ("sie", "they", THEY),
            ("wir", "we", THEY),
            ("du", "you", SECOND),
        )
    ],
    3,
)
_OBJECT_PRONOUNS = {
    case: Zipf([phrase._replace(light=True) for phrase in _phrases(table)], 2)
    for case, table in OBJECT_PRONOUNS.items()
}
_SUBJECTS = Zipf(["noun", "pronoun", "name", "pair"], 0.5)
_SINGULAR_DETERMINERS = Zipf(["the", "a", "possessive", "this", "every"], 0.5)
_PLURAL_DETERMINERS = Zipf(["the", "possessive", "numeral", "this", "quantifier"], 1)
_NEGATIVE_DETERMINER = Zipf(["no"])
_DEFINITE_DETERMINERS = Zipf(["the", "possessive", "this"], 0.5)
_POSSESSIVES = Zipf(_entries(POSSESSIVES), 2)
_NUMERALS = Zipf(_entries(NUMERALS), 3)
_UNDECLINED = {german for german, _ in _NUMERALS.items}
_QUANTIFIERS = Zipf(_entries(QUANTIFIERS), 2)


@dataclass
class Clause:
    """A clause before its words are put in order."""

    subject: Phrase
    finite: str  # German finite verb of a main clause
    bracket: list[str]  # German particle, participle or infinitive that ends a main clause
    final: list[str]  # German verbs that end a subordinate clause
    auxiliary: list[str]  # English; at most one word
    verb: list[str]  # English; the other words
    slots: dict[str, Phrase] = field(default_factory=dict)

    def _words(self, language: str, order: str, fronted: str = "") -> list[str]:
        names = [name for name in order.split() if name in self.slots and name != fronted]
        if language == "german":
            names.sort(key=lambda name: not self.slots[name].light)
        return [word for name in names for word in getattr(self.slots[name], language)]

    def _middle_field(self, fronted: str = "") -> list[str]:
        order = "time frequency recipient object negation manner companion place about complement"
        return self._words("german", order, fronted)

    def german_main(self, fronted: str = "") -> list[str]:
        """Verb second after the `fronted` slot or "subject", or first where none is named."""
        opening = self.subject if fronted == "subject" else self.slots.get(fronted)
        first = opening.german if opening else []
        subject = [] if fronted == "subject" else self.subject.german
        return [*first, self.finite, *subject, *self._middle_field(fronted), *self.bracket]

    def german_subordinate(self) -> list[str]:
        """Verbs last."""
        return [*self.subject.german, *self._middle_field(), *self.final]

    def _predicate(self, auxiliary: list[str], fronted: str = "") -> list[str]:
        after = "complement object about recipient manner companion place time"
        adverbs = self._words("english", "negation frequency")
        return [*auxiliary, *adverbs, *self.verb, *self._words("english", after, fronted)]

    def english_statement(self, fronted: str = "") -> list[str]:
        """Subject first, except after an adverbial that German fronts too."""
        if fronted not in ("time", "place"):
            return [*self.subject.english, *self._predicate(self.auxiliary)]
        first = self.slots[fronted].english
        return [*first, *self.subject.english, *self._predicate(self.auxiliary, fronted)]

    def english_question(self) -> list[str]:
        """Auxiliary first."""
        return [*self.auxiliary, *self.subject.english, *self._predicate([])]


class _Grammar:
    """Draws phrases, clauses and sentences."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def noun(self, kinds: str) -> Noun:
        """A noun of one of the kinds, each as likely as the others; things may be compounds."""
        noun = _NOUNS[kinds[int(self.rng.random() * len(kinds))]].draw(self.rng)
        if noun.kind != "T" or not self.chance(0.15):
            return noun
        german, english = _MODIFIERS.draw(self.rng)
        if english == noun.english:
            return noun
        return noun._replace(
            german=german + noun.german.lower(),
            german_plural=german + noun.german_plural.lower(),
            english=f"{english} {noun.english}",
            english_plural=f"{english} {noun.english_plural}",
        )

    def determiner(self, name: str, gender: str, case: int) -> tuple[str, str, str]:
        """German form, English word, declension of a following adjective."""
        if name == "the":
            return DEFINITE[gender][case], "the", "weak"
        if name == "this":
            english = "these" if gender == PLURAL else "this"
            return "dies" + DETERMINER_ENDINGS[gender][case], english, "weak"
        if name == "every":
            return "jed" + DETERMINER_ENDINGS[gender][case], "every", "weak"
        if name == "numeral":
            german, english = _NUMERALS.draw(self.rng)
            return german, english, "strong"
        if name == "quantifier":
            german, english = _QUANTIFIERS.draw(self.rng)
            return german + DETERMINER_ENDINGS[gender][case], english, "strong"
        if name == "possessive":
            german, english = _POSSESSIVES.draw(self.rng)
        else:
            german, english = {"a": ("ein", "a"), "no": ("kein", "no")}[name]
        return german + EIN_ENDINGS[gender][case], english, "mixed"

    def noun_phrase(
        self,
        kinds: str,
        case: int,
        determiners: Zipf[str] | None = None,
        *,
        singular: bool = False,
        bare: bool = False,
    ) -> Phrase:
        """Determiner, adjective, noun, and unless `bare` what follows the noun."""
        noun = self.noun(kinds)
        gender = noun.gender if singular or not self.chance(0.3) else PLURAL
        if determiners is None:
            determiners = _PLURAL_DETERMINERS if gender == PLURAL else _SINGULAR_DETERMINERS
        name = determiners.draw(self.rng)
        german_determiner, english_determiner, declension = self.determiner(name, gender, case)
        german, english = [german_determiner], [english_determiner]
        if self.chance(0.1 if bare else 0.2):
            animate = noun.kind in ANIMATE
            adjectives = _ANIMATE_ADJECTIVES if animate else _INANIMATE_ADJECTIVES
            adjective = adjectives.draw(self.rng)
            german.append(adjective.stem + ADJECTIVE_ENDINGS[declension][gender][case])
            english.append(adjective.english)
        german.append(noun.form(gender, case))
        english += (noun.english_plural if gender == PLURAL else noun.english).split()
        if not bare and self.chance(0.08):
            attribute = self.attribute(noun.kind)
            german += attribute.german
            english += attribute.english
        person = THEY if gender == PLURAL else THIRD
        return Phrase(german, english, person, gender, human=noun.kind == "P")

    def attribute(self, kind: str) -> Phrase:
        """What follows a noun of that kind: where a person is from, or a genitive."""
        if kind == "P" and self.chance(0.5):
            return self.adverbial("aus", "from", "L", DATIVE, city="aus")
        owner = self.noun_phrase("O", GENITIVE, _DEFINITE_DETERMINERS, singular=True, bare=True)
        return Phrase(owner.german, ["of", *owner.english])

    def adverbial(
        self, preposition: str, english: str, kinds: str, case: int, city: str = ""
    ) -> Phrase:
        """Preposition and noun phrase; or a city, if given the German preposition for cities."""
        if city and self.chance(0.2):
            name = _CITIES.draw(self.rng)
            return Phrase([city, *name.german], [*english.split("_"), *name.english])
        phrase = self.noun_phrase(kinds, case, bare=True)
        german = _after_preposition(preposition, phrase.german)
        return Phrase(german, [*english.split("_"), *phrase.english])

    def subject(self, kinds: str, bare: bool) -> Phrase:
        """A noun phrase, or where animals and persons are asked for also a pronoun or names."""
        kind = _SUBJECTS.draw(self.rng)
        if kind == "noun" or kinds != ANIMATE:
            return self.noun_phrase(kinds, NOMINATIVE, bare=bare)
        if kind == "pronoun":
            return _SUBJECT_PRONOUNS.draw(self.rng)
        first, second = _NAMES.draw(self.rng), _NAMES.draw(self.rng)
        if kind == "name" or first == second:
            return first
        german, english = [*first.german, "und"], [*first.english, "and"]
        return Phrase([*german, *second.german], [*english, *second.english], THEY)

    def object(self, verb: Verb, determiners: Zipf[str] | None, bare: bool) -> Phrase:
        """What the verb governs; of a verb that takes persons also a pronoun or a name."""
        if "P" in verb.kinds and determiners is not _NEGATIVE_DETERMINER:
            if self.chance(0.15):
                return _OBJECT_PRONOUNS[verb.case].draw(self.rng)
            if self.chance(0.15):
                return _NAMES.draw(self.rng)
        return self.noun_phrase(verb.kinds, verb.case, determiners, bare=bare)

    def conjugate(self, verb: Verb, tense: str, subject: Phrase, split: bool) -> Clause:
        """Subject and verb; `split` asks for an English auxiliary, as `not` and questions do."""
        person = subject.person
        if verb is _COPULA and tense in ("present", "perfect"):
            past = tense == "perfect"  # German prefers `war` to `ist gewesen`
            finite = (SEIN_PAST if past else SEIN)[person]
            return Clause(subject, finite, [], [finite], [(BE_PAST if past else BE)[person]], [])
        if tense == "present":
            finite = verb.present(person)
            bracket = [verb.particle] if verb.particle else []
            final = [verb.particle + finite]
            return Clause(subject, finite, bracket, final, *_english(verb.english, person, split))
        if tense == "perfect":
            finite, last = verb.perfect[person], verb.participle
            auxiliary, words = (["did"], verb.english) if split else ([], verb.english_past)
            return Clause(subject, finite, [last], [last, finite], auxiliary, words)
        last = verb.particle + verb.infinitive
        if tense == "future":
            finite, auxiliary, words = WERDEN[person], ["will"], verb.english
        else:
            forms, modal, lexical = _MODALS.draw(self.rng)
            finite, auxiliary, words = forms[person], [modal], verb.english
            if not modal or (lexical and split):
                auxiliary, words = _english([lexical, "to", *words], person, split)
        return Clause(subject, finite, [last], [last, finite], auxiliary, words)

    def clause(
        self,
        frame: str = "",
        *,
        subject: Phrase | None = None,
        asks: str = "",
        bare: bool = False,
    ) -> Clause:
        """A clause built around a verb of the given or any frame.

        `asks` is what a question is about ("time", "place" or another word), "" in a statement;
        `bare` leaves out attributes of nouns and adverbials that the verb does not need.
        """
        frame = frame or _FRAMES.draw(self.rng)
        verb = _COPULA if frame == "copula" else _VERBS[frame].draw(self.rng)
        tense = _TENSES.draw(self.rng)
        inanimate = frame == "copula" and subject is None and self.chance(0.4)
        if subject is None:
            subject = self.subject(INANIMATE if inanimate else ANIMATE, bare)
        # An object may be denied by `kein`; `nicht` denies the rest, with definite objects.
        determiners, split = None, bool(asks)
        negation = "" if asks or not self.chance(0.12) else "nicht"
        if negation and frame == "transitive" and self.chance(0.4):
            negation, determiners = "kein", _NEGATIVE_DETERMINER
        elif negation:
            determiners, split = _DEFINITE_DETERMINERS, True
        clause = self.conjugate(verb, tense, subject, split)
        slots = clause.slots
        if negation == "nicht":
            slots["negation"] = Phrase(["nicht"], ["not"])
        elif not negation and self.chance(0.08):
            slots["frequency"] = _FREQUENCIES.draw(self.rng)
        if asks != "time" and self.chance(0.2):
            slots["time"] = _TIMES[tense].draw(self.rng)
        if frame == "copula":
            adjectives = _INANIMATE_ADJECTIVES if inanimate else _ANIMATE_ADJECTIVES
            adjective = adjectives.draw(self.rng)
            slots["complement"] = Phrase([adjective.german], [adjective.english])
        elif frame == "motion":
            slots["place"] = self.direction()
        elif frame == "prepositional":
            phrase = self.object(verb, determiners, bare=True)
            german = _after_preposition(verb.preposition, phrase.german)
            slots["about"] = Phrase(german, phrase.english)
        elif frame != "clausal":
            if frame in ("transitive", "ditransitive"):
                slots["object"] = self.object(verb, determiners, bare)
            if frame == "dative":
                slots["recipient"] = self.object(verb, determiners, bare)
            if frame == "ditransitive":
                slots["recipient"] = self.recipient(determiners)
            if not bare:
                self.add_adverbial(slots, place=asks != "place")
        return clause

    def direction(self) -> Phrase:
        """Where a motion leads."""
        if self.chance(0.5):
            return self.adverbial("in", "into", "L", ACCUSATIVE)
        return self.adverbial("zu", "to", "LP", DATIVE, city="nach")

    def recipient(self, determiners: Zipf[str] | None) -> Phrase:
        """Indirect object of the verbs of giving."""
        if self.chance(0.2):
            phrase = _OBJECT_PRONOUNS[DATIVE].draw(self.rng)
        elif self.chance(0.2):
            phrase = _NAMES.draw(self.rng)
        else:
            phrase = self.noun_phrase("P", DATIVE, determiners, bare=True)
        return phrase._replace(english=["to", *phrase.english])

    def add_adverbial(self, slots: dict[str, Phrase], place: bool) -> None:
        """At most one of place, companion and manner."""
        if place and self.chance(0.2):
            german, english, kinds = _PLACE_PREPOSITIONS.draw(self.rng)
            city = "in" if german == "in" else ""
            slots["place"] = self.adverbial(german, english, kinds, DATIVE, city)
        elif self.chance(0.08):
            german, english, case = _COMPANION_PREPOSITIONS.draw(self.rng)
            slots["companion"] = self.adverbial(german, english, ANIMATE, CASES[case])
        elif self.chance(0.08):
            slots["manner"] = _MANNERS.draw(self.rng)

    def front(self, clause: Clause) -> str:
        """What opens a main clause: "subject" or a slot whose role its German form tells."""
        slots = clause.slots
        if "time" in slots and self.chance(0.5):
            return "time"
        if "place" in slots and self.chance(0.2):
            return "place"
        # Pronouns and names have no gender here. Of accusatives only the masculine singular differs
        # from the nominative; datives differ unless a numeral begins them.
        thing, person = slots.get("object"), slots.get("recipient")
        if thing and thing.gender == "m" and self.chance(0.25):
            return "object"
        if person and person.gender and person.german[0] not in _UNDECLINED and self.chance(0.25):
            return "recipient"
        return "subject"

    def relative_subject(self, subject: Phrase) -> Phrase:
        """The subject with a relative clause."""
        pronoun = Phrase([DEFINITE[subject.gender][NOMINATIVE]], ["who"], subject.person)
        relative = self.clause(subject=pronoun, bare=True)
        return subject._replace(
            german=[*subject.german, ",", *relative.german_subordinate(), ","],
            english=[*subject.english, *relative.english_statement()],
        )

    def main(self) -> Draft:
        clause = self.clause()
        if clause.subject.human and self.chance(0.12):
            clause.subject = self.relative_subject(clause.subject)
        front = self.front(clause)
        return clause.german_main(front), clause.english_statement(front), "."

    def question(self) -> Draft:
        if self.chance(0.5):
            clause = self.clause(asks="truth")
            return clause.german_main(), clause.english_question(), "?"
        german, english, asks = _QUESTION_WORDS.draw(self.rng)
        clause = self.clause(asks=asks)
        return [german, *clause.german_main()], [english, *clause.english_question()], "?"

    def with_subordinate(self) -> Draft:
        conjunction = _SUBORDINATORS.draw(self.rng)
        clause, subordinate = self.clause(bare=True), self.clause(bare=True)
        german = [*conjunction.german, *subordinate.german_subordinate()]
        english = [*conjunction.english, *subordinate.english_statement()]
        if self.chance(0.5):
            first, second = clause.german_main(), clause.english_statement()
            return [*german, ",", *first], [*english, ",", *second], "."
        front = self.front(clause)
        first, second = clause.german_main(front), clause.english_statement(front)
        return [*first, ",", *german], [*second, *english], "."

    def with_content(self) -> Draft:
        clause, content = self.clause("clausal", bare=True), self.clause(bare=True)
        front = self.front(clause)
        german, english = clause.german_main(front), clause.english_statement(front)
        return (
            [*german, ",", "dass", *content.german_subordinate()],
            [*english, "that", *content.english_statement()],
            ".",
        )

    def coordinated(self) -> Draft:
        conjunction = _COORDINATORS.draw(self.rng)
        first, second = self.clause(bare=True), self.clause(bare=True)
        front = self.front(first)
        german = [*first.german_main(front), ",", *conjunction.german]
        english = [*first.english_statement(front), ",", *conjunction.english]
        return (
            [*german, *second.german_main("subject")],
            [*english, *second.english_statement()],
            ".",
        )


_SENTENCES = Zipf(
    [
        _Grammar.main,
        _Grammar.main,
        _Grammar.main,
        _Grammar.with_subordinate,
        _Grammar.question,
        _Grammar.with_content,
        _Grammar.coordinated,
    ],
    1,
)


def _english(words: list[str], person: int, split: bool) -> tuple[list[str], list[str]]:
    """Auxiliary and verb of the English present."""
    if split:
        return [DO[person]], words
    first, *rest = words
    return [], [with_s(first) if person == THIRD else first, *rest]


def _after_preposition(preposition: str, german: list[str]) -> list[str]:
    first, *rest = german
    contraction = CONTRACTIONS.get((preposition, first))
    return [contraction, *rest] if contraction else [preposition, *german]


def _text(words: list[str], end: str) -> str:
    text = " ".join(words).replace(" ,", ",") + end
    text = re.sub(",(?=[,.?])", "", text)  # a relative clause may end where its sentence does
    return text[0].upper() + text[1:]


def _english_text(words: list[str], end: str) -> str:
    return with_article_an(_text(words, end).replace("can not", "cannot"))


def generate(seed: int, sizes: dict[str, int]) -> dict[str, list[tuple[str, str]]]:
    """German-English sentence pairs as raw text: split name → [(German, English), ...].

    `sizes` is the number of pairs of each split, such as {"train": 20000, "valid": 500}. No
    sentence of either language occurs twice, within a split or across splits. The same seed and
    sizes give the same corpus on every machine. Raises ValueError if a size is negative.
    """
    if any(size < 0 for size in sizes.values()):
        raise ValueError(f"sizes must not be negative, got {sizes}")
    rng = Random(seed)
    grammar = _Grammar(rng)
    seen: set[str] = set()
    corpus: dict[str, list[tuple[str, str]]] = {}
    for split, size in sizes.items():
        pairs = corpus[split] = []
        while len(pairs) < size:
            german_words, english_words, end = _SENTENCES.draw(rng)(grammar)
            german = _text(german_words, end)
            english = _english_text(english_words, end)
            lengths = [len(_TOKEN.findall(text)) for text in (german, english)]
            # German determines English, so English sentences that differ have different sources.
            if min(lengths) < MIN_TOKENS or max(lengths) > MAX_TOKENS or english in seen:
                continue
            seen.add(english)
            pairs.append((german, english))
    return corpus
