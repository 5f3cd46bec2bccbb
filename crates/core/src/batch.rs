//! One batch: documents laid end to end, without padding.

use crate::error::{Error, Result};
use retune_kernels::Spans;

/// The id of the rows an image takes: the first stands for the whole, the others for its patches.
pub const IMAGE: u32 = u32::MAX;

/// Documents laid end to end.
///
/// There is no padding in retune: the tokens of all documents lie in one row of length `N`, and
/// [`Spans`] say where each begins. Attention and positions never cross a border, so a packed
/// row and the same documents one by one give the same numbers.
///
/// An image is a document of patches: rows with the id [`IMAGE`] and numbers in `pixels`. A text
/// may follow it in the same document; its positions count from 0 again.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Token ids, `[N]`.
    pub tokens: Vec<u32>,
    /// Where each document begins and ends.
    pub spans: Spans,
    /// Position of each token in its document, `[N]`; an image and the text behind it are counted
    /// apart.
    pub positions: Vec<usize>,
    /// Pixels of all images, patch by patch: `[patches, channels · patch height · patch width]`.
    pub pixels: Vec<f32>,
    /// Token types (segments) of encoders, `[N]`; zeros where absent.
    pub token_types: Option<Vec<u32>>,
    /// What each token should predict, `[N]`: for language models the *next* token of the same
    /// document where that one is learned, else nothing.
    pub targets: Vec<Option<u32>>,
    /// The class of each document, for classifiers.
    pub classes: Vec<Option<u32>>,
    /// Where each document came from (row numbers of the data), for messages.
    pub rows: Vec<usize>,
    /// The task of each document, for methods that learn several; nothing where the method's own
    /// setting counts for all.
    pub tasks: Option<Vec<usize>>,
}

/// One document before it is laid into a [`Batch`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Document {
    /// Token ids; those of an image are [`IMAGE`] and come first.
    pub tokens: Vec<u32>,
    /// Pixels of the image, patch by patch, each channel by channel and row by row.
    pub pixels: Vec<f32>,
    /// Whether each token is learned, i.e. predicted by the one before it.
    pub learn: Vec<bool>,
    /// Token types, where the model has them.
    pub token_types: Option<Vec<u32>>,
    /// The document's class, for classifiers.
    pub class: Option<u32>,
    /// The document's task, for methods that tell tasks apart.
    pub task: Option<usize>,
    /// Row number in the data.
    pub row: usize,
}

impl Batch {
    /// Lays documents end to end.
    ///
    /// # Errors
    /// [`Error::Input`] if a document is empty, `learn` has another length than `tokens`, or some
    /// documents say their task and others do not.
    pub fn new(documents: &[Document]) -> Result<Self> {
        let total = documents.iter().map(|d| d.tokens.len()).sum();
        let mut batch = Self {
            tokens: Vec::with_capacity(total),
            spans: Spans::from_lengths(documents.iter().map(|d| d.tokens.len())),
            positions: Vec::with_capacity(total),
            pixels: Vec::with_capacity(documents.iter().map(|d| d.pixels.len()).sum()),
            token_types: None,
            targets: Vec::with_capacity(total),
            classes: Vec::with_capacity(documents.len()),
            rows: Vec::with_capacity(documents.len()),
            tasks: None,
        };
        let typed = documents.iter().any(|d| d.token_types.is_some());
        let mut types = Vec::new();
        for document in documents {
            let length = document.tokens.len();
            if length == 0 || document.learn.len() != length {
                return Err(Error::Input {
                    what: format!("row {} cannot be laid into a batch", document.row),
                    expected: "at least one token, and one learn mark for each".to_owned(),
                    found: format!("{length} tokens, {} marks", document.learn.len()),
                    help: "drop empty rows before batching".to_owned(),
                });
            }
            batch.tokens.extend(&document.tokens);
            let image = image_tokens(&document.tokens);
            batch.positions.extend((0..image).chain(0..length - image));
            batch.pixels.extend(&document.pixels);
            batch.targets.extend((0..length).map(|t| {
                (t + 1 < length && document.learn[t + 1]).then(|| document.tokens[t + 1])
            }));
            if typed {
                match &document.token_types {
                    Some(row) => types.extend(row.iter().copied()),
                    None => types.extend(std::iter::repeat_n(0, length)),
                }
            }
            batch.classes.push(document.class);
            batch.rows.push(document.row);
        }
        batch.token_types = typed.then_some(types);
        let tasks: Vec<usize> = documents.iter().filter_map(|document| document.task).collect();
        if !tasks.is_empty() && tasks.len() < documents.len() {
            let silent = documents.iter().find(|document| document.task.is_none());
            return Err(Error::Input {
                what: format!("row {} does not say its task", silent.map_or(0, |d| d.row)),
                expected: "a task in every row, or in none".to_owned(),
                found: format!("tasks in {} of {} rows", tasks.len(), documents.len()),
                help: "give each row its task, counted from 0".to_owned(),
            });
        }
        batch.tasks = (!tasks.is_empty()).then_some(tasks);
        Ok(batch)
    }

    /// Returns the number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Returns how many labels carry a loss: learned tokens, or classified documents.
    pub fn num_labels(&self, head: &crate::spec::Head) -> usize {
        match head {
            crate::spec::Head::Language { .. } => self.targets.iter().flatten().count(),
            crate::spec::Head::Pairs => self.matches().into_iter().flatten().count(),
            _ => self.classes.iter().flatten().count(),
        }
    }

    /// Returns how many rows of a document are its image's, and how many its text's.
    pub fn sides(&self, span: std::ops::Range<usize>) -> [usize; 2] {
        let image = image_tokens(&self.tokens[span.clone()]);
        [image, span.len() - image]
    }

    /// Returns the place of each image's text among the texts of the batch: its own where it has
    /// one, else that of its class, where it has one.
    pub fn matches(&self) -> Vec<Option<usize>> {
        let mut list = Vec::new();
        let mut texts = 0;
        for (document, span) in self.spans.iter().enumerate() {
            let [image, text] = self.sides(span);
            if image > 0 {
                let of_class = self.classes[document].map(|class| class as usize);
                list.push(if text > 0 { Some(texts) } else { of_class });
            }
            texts += usize::from(text > 0);
        }
        list
    }

    /// Returns whether every document is an image with its text.
    pub fn is_paired(&self) -> bool {
        self.spans.iter().all(|span| self.sides(span).iter().all(|side| *side > 0))
    }

    /// Checks that every document's task is one of `count`.
    ///
    /// # Errors
    /// [`Error::Input`] that names the row of the first that is not, or a list of another length.
    pub fn check_tasks(&self, count: usize) -> Result<()> {
        let Some(tasks) = &self.tasks else { return Ok(()) };
        let wrong = |what: String, expected: String, found: usize| Error::Input {
            what,
            expected,
            found: found.to_string(),
            help: "give each row the number of its task, counted from 0".to_owned(),
        };
        if tasks.len() != self.spans.documents() {
            let expected = format!("one for each of {} documents", self.spans.documents());
            return Err(wrong("tasks do not fit the batch".to_owned(), expected, tasks.len()));
        }
        match tasks.iter().zip(&self.rows).find(|(task, _)| **task >= count) {
            Some((task, row)) => {
                let what = format!("row {row} has a task the method does not know");
                Err(wrong(what, format!("0 to {}", count.saturating_sub(1)), *task))
            }
            None => Ok(()),
        }
    }

    /// Checks that a model of this vocabulary and length can read the batch, when a method takes
    /// `taken` positions before each document.
    ///
    /// # Errors
    /// [`Error::Input`] that names the row of the first token or document that does not fit.
    pub fn check(&self, spec: &crate::spec::ModelSpec, taken: usize) -> Result<()> {
        let mut num_patches = 0;
        for (index, span) in self.spans.iter().enumerate() {
            let row = self.rows.get(index).copied().unwrap_or(index);
            let [image, _] = self.sides(span.clone());
            let fits = |wanted| image == 0 || image == wanted;
            let wanted = spec.image().map_or(0, crate::spec::ImageSpec::num_tokens);
            if !fits(wanted) {
                return Err(Error::Input {
                    what: format!("row {row} has an image the model cannot read"),
                    expected: match wanted {
                        0 => format!("text only, as {} reads no images", spec.class),
                        _ => format!("{wanted} rows, one for the image and one for each patch"),
                    },
                    found: format!("{image} rows"),
                    help: "use a model that reads images of this size".to_owned(),
                });
            }
            num_patches += image.saturating_sub(1);
            let span = span.start + image..span.end;
            if let Some(token) =
                self.tokens[span.clone()].iter().find(|t| **t as usize >= spec.vocabulary)
            {
                return Err(Error::Input {
                    what: format!("row {row} has a token the model does not know"),
                    expected: format!("ids below {}", spec.vocabulary),
                    found: token.to_string(),
                    help: "the tokenizer belongs to another model; use the one beside the weights"
                        .to_owned(),
                });
            }
            // Patches have their places in the image, whatever stands before them.
            let Some(last) = self.positions[span].iter().max().copied() else { continue };
            if last + taken >= spec.max_positions {
                let room = spec.max_positions.saturating_sub(taken);
                return Err(Error::Input {
                    what: format!("row {row} is longer than the model can read"),
                    expected: match taken {
                        0 => format!("at most {room} tokens"),
                        _ => {
                            format!("at most {room} tokens, as the method takes {taken} positions")
                        }
                    },
                    found: format!("{} tokens", last + 1),
                    help: "set a smaller `data.max_length`, or split the row".to_owned(),
                });
            }
        }
        let values = spec.image().map_or(0, crate::spec::ImageSpec::patch_values);
        if self.pixels.len() != num_patches * values {
            return Err(Error::Input {
                what: "the pixels of the batch do not fit its images".to_owned(),
                expected: format!("{values} numbers for each of {num_patches} patches"),
                found: format!("{} numbers", self.pixels.len()),
                help: "prepare the images for this model".to_owned(),
            });
        }
        Ok(())
    }
}

/// Returns how many rows at the beginning of a document are an image's.
fn image_tokens(tokens: &[u32]) -> usize {
    tokens.iter().take_while(|token| **token == IMAGE).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(tokens: &[u32], learn: &[u8], row: usize) -> Document {
        Document {
            tokens: tokens.to_vec(),
            learn: learn.iter().map(|l| *l == 1).collect(),
            row,
            ..Document::default()
        }
    }

    #[test]
    fn targets_are_the_next_token_of_the_same_document() {
        let batch =
            Batch::new(&[document(&[5, 6, 7], &[0, 1, 1], 0), document(&[8, 9], &[1, 1], 1)])
                .unwrap();
        // 7 ends its document: it must not learn to predict 8.
        assert_eq!(batch.targets, [Some(6), Some(7), None, Some(9), None]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.spans.iter().collect::<Vec<_>>(), [0..3, 3..5]);
    }

    fn picture(text: &[u32], class: Option<u32>, row: usize) -> Document {
        let tokens: Vec<u32> = [IMAGE; 3].into_iter().chain(text.iter().copied()).collect();
        let learn = vec![false; tokens.len()];
        Document { tokens, learn, pixels: vec![0.5; 2], class, row, ..Document::default() }
    }

    #[test]
    fn an_image_and_its_text_are_counted_apart() {
        let batch = Batch::new(&[picture(&[7, 8], None, 0), picture(&[9], None, 1)]).unwrap();
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 1, 2, 0]);
        assert_eq!(batch.pixels, [0.5; 4]);
        assert_eq!(
            batch.spans.iter().map(|s| batch.sides(s)).collect::<Vec<_>>(),
            [[3, 2], [3, 1]]
        );
        assert_eq!((batch.matches(), batch.is_paired()), (vec![Some(0), Some(1)], true));
    }

    #[test]
    fn images_without_a_text_belong_to_that_of_their_class() {
        let prompts = [document(&[4], &[0], 0), document(&[5], &[0], 1)];
        let images = [picture(&[], Some(1), 2), picture(&[], None, 3), picture(&[], Some(0), 4)];
        let batch = Batch::new(&[&images[..], &prompts[..]].concat()).unwrap();
        assert_eq!((batch.matches(), batch.is_paired()), (vec![Some(1), None, Some(0)], false));
        assert_eq!(batch.num_labels(&crate::spec::Head::Pairs), 2);
    }

    #[test]
    fn tasks_are_said_by_all_documents_or_none() {
        let of = |task| Document { task, ..document(&[1, 2], &[0, 1], 7) };
        let batch = Batch::new(&[of(Some(2)), of(Some(0))]).unwrap();
        assert_eq!(batch.tasks, Some(vec![2, 0]));
        assert_eq!(Batch::new(&[of(None)]).unwrap().tasks, None);
        let error = Batch::new(&[of(Some(2)), of(None)]).unwrap_err().to_string();
        assert!(error.contains("row 7 does not say its task"), "{error}");
    }

    #[test]
    fn an_unknown_task_is_named_with_its_row() {
        let mut batch = Batch::new(&[document(&[5], &[0], 4), document(&[6], &[0], 9)]).unwrap();
        assert!(batch.check_tasks(1).is_ok());
        batch.tasks = Some(vec![1, 2]);
        assert!(batch.check_tasks(3).is_ok());
        let error = batch.check_tasks(2).unwrap_err().to_string();
        assert!(error.contains("row 9") && error.contains("0 to 1"), "{error}");
        batch.tasks = Some(vec![0]);
        assert!(batch.check_tasks(2).is_err());
    }

    #[test]
    fn an_empty_document_is_refused() {
        let error = Batch::new(&[document(&[], &[], 17)]).unwrap_err();
        assert!(error.to_string().contains("row 17"), "{error}");
    }
}
