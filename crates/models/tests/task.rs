//! A checkpoint opened for a task it was not saved for.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as the tests do")]

use retune_core::batch::{Batch, Document};
use retune_core::random::Seed;
use retune_core::spec::Head;
use retune_core::weights::{Packing, Stored, WeightSource};
use retune_models::{Checkpoint, Task, open, open_for};
use retune_testkit::golden::{Tensors, assert_close, folder};
use retune_testkit::run;

fn classify(labels: &[&str]) -> Task {
    Task::Classify { labels: labels.iter().map(|label| (*label).to_owned()).collect() }
}

fn outputs(checkpoint: &Checkpoint, batch: &Batch) -> retune_core::Result<Vec<f32>> {
    run::outputs(&*checkpoint.model, &checkpoint.source, batch, Packing::default())
}

fn values(source: &dyn WeightSource, name: &str) -> Vec<f32> {
    match source.read(name).unwrap() {
        Stored::Values(values) => values,
        Stored::Blocks(..) => unreachable!("a safetensors file has plain values"),
    }
}

#[test]
fn a_bare_encoder_gets_a_new_head() {
    let base = folder("families/bert_embedding");
    let task = classify(&["no", "maybe", "yes"]);
    let checkpoint = open_for(&base, &task, Seed(7)).unwrap();
    assert_eq!(checkpoint.fresh, ["classifier.bias", "classifier.weight"]);
    let spec = checkpoint.model.spec();
    assert_eq!(spec.class, "BertForSequenceClassification");
    let labels = vec!["no".to_owned(), "maybe".to_owned(), "yes".to_owned()];
    assert_eq!(spec.head, Head::Classes { labels });
    assert_eq!(values(&*checkpoint.source, "classifier.bias"), [0.0; 3]);
    let weight = values(&*checkpoint.source, "classifier.weight");
    let deviation = (weight.iter().map(|w| w * w).sum::<f32>() / weight.len() as f32).sqrt();
    assert!((0.01..0.03).contains(&deviation), "{deviation}");
    // The body is the checkpoint's, under the names of the class with a head.
    let embed = open(&base).unwrap();
    let name = "encoder.layer.1.output.dense.weight";
    assert_eq!(values(&*checkpoint.source, &format!("bert.{name}")), values(&*embed.source, name));
    let rows = Tensors::open("families/bert_embedding/expected.safetensors").rows();
    let logits = outputs(&checkpoint, &rows.batch()).unwrap();
    assert_eq!(logits.len(), rows.count * 3);
    // Same seed, same head; the base's identity is the files', not the head's.
    let again = open_for(&base, &task, Seed(7)).unwrap();
    let other = open_for(&base, &task, Seed(8)).unwrap();
    assert_eq!(values(&*again.source, "classifier.weight"), weight);
    assert_ne!(values(&*other.source, "classifier.weight"), weight);
    assert_eq!(other.fingerprint(), embed.fingerprint());
}

#[test]
fn a_decoder_classifies_by_its_last_token() {
    let checkpoint =
        open_for(&folder("training/llama/base"), &classify(&["a", "b"]), Seed(1)).unwrap();
    assert_eq!(checkpoint.model.spec().class, "LlamaForSequenceClassification");
    assert_eq!(checkpoint.fresh, ["score.weight"]);
    assert_eq!(checkpoint.unused, ["lm_head.weight"]);
}

#[test]
fn a_saved_head_is_kept_for_its_own_labels_only() {
    let base = folder("families/llama_classes");
    assert!(open_for(&base, &classify(&["a", "b", "c"]), Seed(1)).unwrap().fresh.is_empty());
    let other = open_for(&base, &classify(&["c", "b", "a"]), Seed(1)).unwrap();
    assert_eq!(other.fresh, ["score.weight"]);
    let fewer = open_for(&base, &classify(&["a", "b"]), Seed(1)).unwrap();
    assert_eq!(fewer.fresh, ["score.weight"]);
    assert!(open_for(&base, &classify(&["a"]), Seed(1)).is_err());
}

#[test]
fn a_classifier_gives_embeddings_too() {
    let checkpoint = open_for(&folder("training/bert/base"), &Task::Embed, Seed(0)).unwrap();
    assert!(checkpoint.unused.iter().any(|name| name.contains("pooler")));
    let rows = Tensors::open("training/bert/batch.safetensors").rows();
    let found = outputs(&checkpoint, &rows.batch()).unwrap();
    let lengths: Vec<f32> =
        found.chunks(64).map(|row| row.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
    assert_close("lengths", &lengths, &vec![1.0; rows.count], 1e-6);
}

#[test]
fn a_token_type_beyond_the_table_is_refused() {
    let checkpoint = open(&folder("families/bert_embedding")).unwrap();
    let document = Document {
        tokens: vec![5, 6],
        learn: vec![false; 2],
        token_types: Some(vec![0, 2]),
        ..Document::default()
    };
    let batch = Batch::new(&[document]).unwrap();
    let message = outputs(&checkpoint, &batch).unwrap_err().to_string();
    assert!(message.contains("token types below 2"), "{message}");
}
