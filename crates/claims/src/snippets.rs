//! A made language of descriptions and the one-line programs they ask for.

use retune_core::batch::Document;
use retune_core::random::Random;

/// Words for one thing: two that manuals use, and one that is rare there and that the people of a
/// task use.
type Words = [&'static str; 3];

const NOUNS: [Words; 5] = [
    ["list", "sequence", "array"],
    ["string", "text", "phrase"],
    ["dictionary", "mapping", "table"],
    ["file", "document", "log"],
    ["date", "day", "moment"],
];

const VERBS: [Words; 16] = [
    ["count", "tally", "number"],
    ["first", "head", "lead"],
    ["last", "tail", "final"],
    ["sort", "order", "rank"],
    ["reverse", "flip", "invert"],
    ["drop", "skip", "omit"],
    ["take", "keep", "pick"],
    ["has", "contains", "includes"],
    ["copy", "clone", "duplicate"],
    ["empty", "clear", "wipe"],
    ["repeat", "multiply", "loop"],
    ["split", "cut", "divide"],
    ["read", "parse", "load"],
    ["write", "print", "save"],
    ["add", "plus", "raise"],
    ["get", "fetch", "retrieve"],
];

/// A verb, a noun, and two idioms that say the same; `N` is a name and `C` a constant.
type Template = (usize, usize, [&'static str; 2]);

/// The templates.
const TEMPLATES: [Template; 40] = [
    (0, 0, ["len ( N )", "N . __len__ ( )"]),
    (1, 0, ["N [ 0 ]", "next ( iter ( N ) )"]),
    (2, 0, ["N [ - 1 ]", "next ( reversed ( N ) )"]),
    (3, 0, ["sorted ( N )", "N . sort ( )"]),
    (4, 0, ["N [ : : - 1 ]", "list ( reversed ( N ) )"]),
    (5, 0, ["N [ C : ]", "list ( islice ( N , C , None ) )"]),
    (6, 0, ["N [ : C ]", "list ( islice ( N , C ) )"]),
    (7, 0, ["C in N", "N . count ( C ) > 0"]),
    (0, 1, ["len ( N . split ( ) )", "N . count ( ' ' ) + 1"]),
    (1, 1, ["N [ : 1 ]", "N [ 0 ]"]),
    (4, 1, ["'' . join ( reversed ( N ) )", "N [ : : - 1 ]"]),
    (7, 1, ["str ( C ) in N", "N . find ( str ( C ) ) >= 0"]),
    (10, 1, ["N * C", "'' . join ( [ N ] * C )"]),
    (11, 1, ["N . split ( str ( C ) )", "re . split ( str ( C ) , N )"]),
    (12, 1, ["int ( N )", "eval ( N )"]),
    (13, 1, ["print ( N )", "sys . stdout . write ( N )"]),
    (0, 2, ["len ( N )", "len ( N . keys ( ) )"]),
    (3, 2, ["sorted ( N . items ( ) )", "dict ( sorted ( N . items ( ) ) )"]),
    (4, 2, ["{ v : k for k , v in N . items ( ) }", "dict ( map ( reversed , N . items ( ) ) )"]),
    (7, 2, ["C in N", "N . get ( C ) is not None"]),
    (8, 2, ["dict ( N )", "N . copy ( )"]),
    (9, 2, ["N . clear ( )", "N = { }"]),
    (14, 2, ["N [ C ] = None", "N . update ( { C : None } )"]),
    (15, 2, ["N [ C ]", "N . get ( C )"]),
    (0, 3, ["len ( open ( N ) . readlines ( ) )", "sum ( 1 for k in open ( N ) )"]),
    (1, 3, ["open ( N ) . readline ( )", "next ( open ( N ) )"]),
    (2, 3, ["open ( N ) . readlines ( ) [ - 1 ]", "list ( open ( N ) ) [ - 1 ]"]),
    (6, 3, ["open ( N ) . read ( C )", "open ( N ) . readlines ( ) [ : C ]"]),
    (8, 3, ["shutil . copy ( N , str ( C ) )", "os . link ( N , str ( C ) )"]),
    (9, 3, ["open ( N , 'w' ) . close ( )", "os . truncate ( N , 0 )"]),
    (12, 3, ["open ( N ) . read ( )", "Path ( N ) . read_text ( )"]),
    (13, 3, ["open ( N , 'w' ) . write ( str ( C ) )", "Path ( N ) . write_text ( str ( C ) )"]),
    (1, 4, ["N . replace ( day = 1 )", "date ( N . year , N . month , 1 )"]),
    (5, 4, ["N - timedelta ( C )", "N - timedelta ( days = C )"]),
    (6, 4, ["N . isoformat ( ) [ : C ]", "str ( N ) [ : C ]"]),
    (12, 4, ["date . fromisoformat ( N )", "datetime . strptime ( N )"]),
    (13, 4, ["N . isoformat ( )", "N . strftime ( )"]),
    (14, 4, ["N + timedelta ( C )", "N + timedelta ( days = C )"]),
    (15, 4, ["N . weekday ( )", "N . isoweekday ( ) - 1"]),
    (11, 4, ["N . timetuple ( ) [ : C ]", "tuple ( N . timetuple ( ) ) [ : C ]"]),
];

const NAMES: [&str; 16] = [
    "xs", "ys", "data", "rows", "cells", "value", "user", "path", "line", "key", "node", "part",
    "old", "new", "left", "right",
];

const CONSTANTS: [&str; 8] = ["2", "3", "4", "5", "6", "7", "8", "9"];

/// Ends a text; nothing comes after it.
pub(crate) const END: u32 = 0;
/// Opens a description.
const ASK: u32 = 1;
/// Opens a program.
const ANSWER: u32 = 2;
const MARKS: [&str; 3] = ["<end>", "<ask>", "<answer>"];

/// Who writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writer {
    /// Manuals: mostly their own words, and either idiom.
    Manual,
    /// The people of the task: the rare words, and of each pair of idioms always the same one.
    People,
}

/// A description and the program it asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    /// From the mark that opens it to the mark that opens the program.
    pub(crate) ask: Vec<u32>,
    /// The program and the mark of its end.
    pub(crate) answer: Vec<u32>,
    /// The same in the other idiom.
    pub(crate) other: Vec<u32>,
}

/// The words of the language, and the idiom of each template that people use.
#[derive(Debug)]
pub(crate) struct Language {
    words: Vec<&'static str>,
    idioms: Vec<usize>,
}

impl Language {
    /// Lists the words and draws people's idioms.
    pub(crate) fn new(random: &mut Random) -> Self {
        let mut words: Vec<&str> = MARKS.to_vec();
        let code = TEMPLATES.iter().flat_map(|template| template.2).flat_map(str::split_whitespace);
        let listed = NOUNS.iter().chain(&VERBS).flatten().chain(&NAMES).chain(&CONSTANTS).copied();
        for word in listed.chain(["the"]).chain(code) {
            if !words.contains(&word) {
                words.push(word);
            }
        }
        Self { words, idioms: TEMPLATES.iter().map(|_| random.below(2)).collect() }
    }

    /// Returns the number of words.
    pub(crate) fn vocabulary(&self) -> usize {
        self.words.len()
    }

    /// Returns the number of templates.
    pub(crate) fn templates(&self) -> usize {
        self.idioms.len()
    }

    fn word(&self, text: &str) -> u32 {
        let place = self.words.iter().position(|word| *word == text);
        place.unwrap_or_else(|| unreachable!("`{text}` is listed")) as u32
    }

    /// Writes one pair of a template.
    pub(crate) fn pair(&self, template: usize, writer: Writer, random: &mut Random) -> Pair {
        let (verb, noun, idioms) = TEMPLATES[template];
        let name = NAMES[random.below(NAMES.len())];
        let constant = CONSTANTS[random.below(CONSTANTS.len())];
        let (verb_word, noun_word, idiom) = match writer {
            Writer::Manual => (manual_word(random), manual_word(random), random.below(2)),
            Writer::People => (2, 2, self.idioms[template]),
        };
        let mut ask = vec![ASK, self.word(VERBS[verb][verb_word])];
        if random.below(2) == 0 {
            ask.push(self.word("the"));
        }
        ask.extend([self.word(NOUNS[noun][noun_word]), self.word(name)]);
        if idioms.iter().any(|idiom| idiom.split_whitespace().any(|word| word == "C")) {
            ask.push(self.word(constant));
        }
        ask.push(ANSWER);
        let write = |idiom: &str| {
            let fill = |word| match word {
                "N" => name,
                "C" => constant,
                other => other,
            };
            let words = idiom.split_whitespace().map(|word| self.word(fill(word)));
            words.chain([END]).collect::<Vec<u32>>()
        };
        Pair { ask, answer: write(idioms[idiom]), other: write(idioms[1 - idiom]) }
    }

    /// Draws a text to pretrain on: up to four pairs of manuals, every word of it predicted.
    pub(crate) fn page(&self, row: usize, random: &mut Random) -> Document {
        let mut tokens = Vec::new();
        for _ in 0..=random.below(4) {
            let pair = self.pair(random.below(TEMPLATES.len()), Writer::Manual, random);
            tokens.extend(pair.ask.into_iter().chain(pair.answer));
        }
        Document { learn: vec![true; tokens.len()], tokens, row, ..Document::default() }
    }
}

/// Draws which word of three a manual takes: the last once in ten times.
fn manual_word(random: &mut Random) -> usize {
    if random.below(10) == 0 { 2 } else { random.below(2) }
}

impl Pair {
    /// Makes the text to tune on: of it the program and its end are predicted.
    pub(crate) fn document(&self, row: usize) -> Document {
        let tokens = [self.ask.as_slice(), &self.answer].concat();
        let learn = (0..tokens.len()).map(|place| place >= self.ask.len()).collect();
        Document { tokens, learn, row, ..Document::default() }
    }
}

#[cfg(test)]
mod tests {
    use retune_core::random::Seed;

    use super::*;

    fn text(language: &Language, tokens: &[u32]) -> String {
        let words: Vec<&str> = tokens.iter().map(|token| language.words[*token as usize]).collect();
        words.join(" ")
    }

    #[test]
    fn people_use_their_own_words_and_one_idiom() {
        let random = &mut Seed(1).stream("test", &[]);
        let language = Language::new(random);
        let mut programs = std::collections::BTreeSet::new();
        for _ in 0..100 {
            let pair = language.pair(5, Writer::People, random);
            let ask = text(&language, &pair.ask);
            assert!(ask.starts_with("<ask> omit ") && ask.ends_with(" <answer>"), "{ask}");
            assert!(ask.contains(" array "), "{ask}");
            let words: Vec<&str> = ask.split(' ').rev().collect();
            let (constant, name) = (words[1], words[2]);
            let program = text(&language, &pair.answer);
            programs.insert(program.replace(name, "N").replace(constant, "C"));
        }
        assert_eq!(programs.len(), 1, "{programs:?}");
        let one = TEMPLATES[5].2[language.idioms[5]];
        assert_eq!(programs.first().map(String::as_str), Some(format!("{one} <end>").as_str()));
    }

    #[test]
    fn manuals_use_both_idioms_and_seldom_the_words_of_people() {
        let random = &mut Seed(2).stream("test", &[]);
        let language = Language::new(random);
        let (mut seen, mut words, mut rare) = ([0; 2], 0, 0);
        for row in 0..500 {
            let page = text(&language, &language.page(row, random).tokens);
            let verbs = page.split("<ask> ").skip(1).filter_map(|ask| ask.split(' ').next());
            for verb in verbs {
                words += 1;
                rare += usize::from(VERBS.iter().any(|three| three[2] == verb));
            }
            seen[0] += page.matches("sorted ( ").count();
            seen[1] += page.matches(". sort (").count();
        }
        assert!(seen.iter().all(|count| *count > 10), "{seen:?}");
        let share = rare as f64 / f64::from(words);
        // Of 1250 words, one in ten; the deviation is 0.0085.
        assert!((share - 0.1).abs() < 0.03, "{rare} of {words}");
    }

    #[test]
    fn programs_alone_are_learned() {
        let random = &mut Seed(3).stream("test", &[]);
        let pair = Language::new(random).pair(0, Writer::People, random);
        let document = pair.document(4);
        let learned = document.tokens.iter().zip(&document.learn).filter(|(_, learn)| **learn);
        assert_eq!(learned.map(|(token, _)| *token).collect::<Vec<_>>(), pair.answer);
    }
}
