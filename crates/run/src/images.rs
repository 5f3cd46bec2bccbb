//! Pictures as documents of a batch: patches, classes, captions and the prompts of classes.

use retune_core::batch::{Document, IMAGE};
use retune_core::random::Seed;
use retune_core::spec::ImageSpec;
use retune_data::image::set::ImageSet;
use retune_data::image::transform::Augment;
use retune_data::labels::Labels;
use retune_data::statistics::Statistics;
use retune_data::tokenizer::Tokenizer;

use crate::error::{Error, Result};
use crate::recipe::DataOptions;

/// The prompt of a class where the recipe has none (Radford et al., 2021, arXiv 2103.00020).
const USUAL_PROMPT: &str = "a photo of a {label}.";

/// What stands for the class in prompts and captions.
const FIELD: &str = "{label}";

/// Pictures prepared for a model, with the texts they belong to.
#[derive(Debug)]
pub struct Images {
    set: ImageSet,
    spec: ImageSpec,
    augment: Augment,
    texts: Texts,
    seed: Seed,
    statistics: Statistics,
    lengths: Vec<u32>,
}

/// What a tower of texts reads beside the pictures.
#[derive(Debug)]
enum Texts {
    /// There is no such tower.
    None,
    /// A text of its own for each picture.
    Own(Vec<Vec<u32>>),
    /// A text for each class; captions, template by template, only where the recipe has some.
    OfClasses { prompts: Vec<Vec<u32>>, captions: Vec<Vec<Vec<u32>>> },
}

/// The tokenizer of a tower of texts, and the longest text it reads.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The longest text in tokens.
    pub max_length: usize,
}

impl Reader<'_> {
    /// Turns a text into tokens; one that is too long loses what stands before its end token.
    fn read(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text, true)?.ids;
        if ids.len() > self.max_length {
            let end = ids.last().copied();
            ids.truncate(self.max_length.saturating_sub(1));
            ids.extend(end);
        }
        if ids.is_empty() {
            return Err(Error::Plan {
                what: format!("the text `{text}` has no token"),
                expected: "at least one".to_owned(),
                found: "none".to_owned(),
                help: "give every picture a text".to_owned(),
            });
        }
        Ok(ids)
    }

    /// Puts each class into a template.
    fn of_classes(&self, template: &str, classes: &[String], key: &str) -> Result<Vec<Vec<u32>>> {
        if !template.contains(FIELD) {
            return Err(Error::Plan {
                what: format!("data.{key}: the class has no place in `{template}`"),
                expected: format!("a text with {FIELD}, as in `{USUAL_PROMPT}`"),
                found: "a text that is the same for every class".to_owned(),
                help: format!("write {FIELD} where the class belongs"),
            });
        }
        classes.iter().map(|class| self.read(&template.replace(FIELD, class))).collect()
    }
}

impl Images {
    /// Joins pictures with the texts they need; `reader` is there where the model has a tower of
    /// texts.
    ///
    /// # Errors
    /// If the pictures have not what the model learns from, or a template has no place for a class.
    pub fn new(
        set: ImageSet,
        spec: ImageSpec,
        reader: Option<Reader<'_>>,
        options: &DataOptions,
        seed: Seed,
    ) -> Result<Self> {
        let wrong = |what: &str, expected: &str, help: &str| Error::Plan {
            what: what.to_owned(),
            expected: expected.to_owned(),
            found: set.statement().to_owned(),
            help: help.to_owned(),
        };
        let classes = match set.labels() {
            Some(Labels::Classes(names)) => Some(names.clone()),
            _ => None,
        };
        let texts = match (reader, classes) {
            (None, None) => {
                return Err(wrong(
                    "this model cannot learn from texts",
                    "pictures with classes",
                    "give labels, or use a model with a tower of texts such as CLIP",
                ));
            }
            (None, Some(_)) => Texts::None,
            (Some(reader), Some(classes)) => {
                let prompt = options.prompt.as_deref().unwrap_or(USUAL_PROMPT);
                let captions = options.captions.iter();
                Texts::OfClasses {
                    prompts: reader.of_classes(prompt, &classes, "prompt")?,
                    captions: captions
                        .map(|caption| reader.of_classes(caption, &classes, "captions"))
                        .collect::<Result<_>>()?,
                }
            }
            (Some(reader), None) => {
                let text = |row| reader.read(set.text(row).unwrap_or_default());
                Texts::Own((0..set.len()).map(text).collect::<Result<_>>()?)
            }
        };
        if options.packing {
            return Err(wrong(
                "data.packing: pictures are not packed",
                "false",
                "raise `train.batch_size` instead; there is no padding either way",
            ));
        }
        let augment = Augment { crop_padding: options.crop_padding, flip: options.flip };
        let mut images = Self {
            set,
            spec,
            augment,
            texts,
            seed,
            statistics: Statistics::default(),
            lengths: Vec::new(),
        };
        images.count();
        Ok(images)
    }

    fn count(&mut self) {
        let longest_caption = |captions: &[Vec<Vec<u32>>]| {
            captions.iter().flatten().map(Vec::len).max().unwrap_or_default()
        };
        let of_text = |row: usize| match &self.texts {
            Texts::None => 0,
            Texts::Own(texts) => texts[row].len(),
            Texts::OfClasses { captions, .. } => longest_caption(captions),
        };
        let lengths = (0..self.set.len()).map(|row| self.spec.num_tokens() + of_text(row));
        self.lengths = lengths.map(|length| length as u32).collect();
        let longest = self.lengths.iter().copied().max().unwrap_or_default() as usize;
        self.statistics = Statistics {
            rows: self.set.len(),
            rows_broken: self.set.num_broken(),
            tokens: self.lengths.iter().map(|length| u64::from(*length)).sum(),
            longest,
            longest_uncut: longest,
            ..Statistics::default()
        };
    }

    /// Returns a picture as a document: for the pass `epoch` over the data, cropped and mirrored
    /// anew and beside a caption; for measuring, as it is.
    ///
    /// # Errors
    /// If the picture's file changed.
    pub fn document(&self, row: usize, epoch: Option<u64>) -> retune_data::Result<Document> {
        let mut picture = self.set.picture(row)?;
        let draw = |purpose: &str, epoch: u64| self.seed.stream(purpose, &[epoch, row as u64]);
        if let (Some(epoch), false) = (epoch, self.augment.is_none()) {
            picture = self.augment.apply(&picture, draw("augmentation", epoch).bits());
        }
        let pixels = self.spec.patches(&self.set.transform().numbers(&picture));
        let mut tokens = vec![IMAGE; self.spec.num_tokens()];
        let class = self.set.class(row);
        match (&self.texts, epoch, class) {
            (Texts::Own(texts), _, _) => tokens.extend(&texts[row]),
            (Texts::OfClasses { captions, .. }, Some(epoch), Some(class))
                if !captions.is_empty() =>
            {
                let template = draw("caption", epoch).below(captions.len());
                tokens.extend(&captions[template][class as usize]);
            }
            _ => {}
        }
        let learn = vec![false; tokens.len()];
        let line = self.set.line(row);
        Ok(Document { tokens, pixels, learn, class, row: line, ..Document::default() })
    }

    /// Returns the prompts a batch of pictures of a pass (or of a measurement) is compared with.
    pub fn prompts(&self, epoch: Option<u64>) -> Vec<Document> {
        let document = |(row, tokens): (usize, &Vec<u32>)| Document {
            learn: vec![false; tokens.len()],
            tokens: tokens.clone(),
            row,
            ..Document::default()
        };
        match (&self.texts, epoch) {
            (Texts::OfClasses { captions, .. }, Some(_)) if !captions.is_empty() => Vec::new(),
            (Texts::OfClasses { prompts, .. }, _) => {
                prompts.iter().enumerate().map(document).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Returns the pictures.
    pub fn set(&self) -> &ImageSet {
        &self.set
    }

    /// Returns the tokens of each row, of a caption the longest.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    /// Returns the counts.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Says what the pictures are and what is learned from them.
    pub fn statement(&self) -> String {
        let learned = match &self.texts {
            Texts::None => "their classes are learned".to_owned(),
            Texts::Own(_) => "each beside its text, against the others of a batch".to_owned(),
            Texts::OfClasses { prompts, captions } if captions.is_empty() => {
                format!("each against the prompts of {} classes", prompts.len())
            }
            Texts::OfClasses { captions, .. } => format!(
                "each beside one of {} captions of its class, against the others of a batch",
                captions.len()
            ),
        };
        let [height, width] = self.spec.size;
        let statement = self.set.statement();
        format!("{statement}, brought to {height} × {width} pixels; {learned}")
    }

    /// Returns what of a row decides the bits of a run, beside the settings of `[data]`.
    pub fn fingerprint(&self, row: usize) -> u64 {
        self.set.contents()[row]
    }

    /// Returns what of the settings decides the bits of a run.
    pub fn settings(&self) -> String {
        format!(
            "{:?} {:?} {:?}",
            self.augment,
            self.set.transform(),
            match &self.texts {
                Texts::Own(texts) => texts.clone(),
                Texts::OfClasses { prompts, captions } => {
                    prompts.iter().chain(captions.iter().flatten()).cloned().collect()
                }
                Texts::None => Vec::new(),
            }
        )
    }

    /// Shows a row as `doctor` does: where the picture lies, and what the model reads of it.
    ///
    /// # Errors
    /// If the picture's file changed.
    pub fn show(&self, row: usize) -> retune_data::Result<String> {
        let document = self.document(row, Some(0))?;
        let class = match (self.set.labels(), document.class) {
            (Some(Labels::Classes(names)), Some(class)) => {
                format!(", class `{}`", names[class as usize])
            }
            _ => String::new(),
        };
        let text = document.tokens.len() - self.spec.num_tokens();
        let beside = match text {
            0 => String::new(),
            text => format!(", beside a text of {text} tokens"),
        };
        let pixels = document.pixels.iter().copied();
        let (low, high) = pixels.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        Ok(format!(
            "{}{class}: {} patches of {} numbers from {low:.3} to {high:.3}{beside}",
            self.set.origin(row),
            self.spec.num_tokens() - 1,
            self.spec.patch_values()
        ))
    }
}
