//! Every element of every golden output of models that read images.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as the tests do")]

use std::path::PathBuf;
use std::sync::Arc;

use retune_core::batch::{Batch, Document, IMAGE};
use retune_core::change::Changes;
use retune_core::model::{Output, Pairs, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::spec::ImageSpec;
use retune_core::weights::{Packing, Weights};
use retune_models::{Checkpoint, Task, open, open_for};
use retune_testkit::golden::{Tensors, assert_close, folder};
use retune_testkit::run::outputs;
use tensor::Device;

/// The same models in float64 differ by up to 7e-7.
const TOLERANCE: f32 = 2e-6;

fn case(name: &str) -> (Checkpoint, Tensors) {
    let path: PathBuf = folder("images").join(name);
    let checkpoint = open(&path).unwrap();
    assert_eq!(checkpoint.unused, Vec::<String>::new(), "{name}");
    (checkpoint, Tensors::at(&path.join("expected.safetensors")))
}

/// Returns the images of a golden file as documents.
fn images(spec: &ImageSpec, expected: &Tensors) -> Vec<Document> {
    let tokens = vec![IMAGE; spec.num_tokens()];
    let document = |(row, image): (usize, &[f32])| Document {
        learn: vec![false; tokens.len()],
        tokens: tokens.clone(),
        pixels: spec.patches(image),
        row,
        ..Document::default()
    };
    let pixels = expected.floats("pixel_values");
    pixels.chunks(spec.num_values()).enumerate().map(document).collect()
}

/// Returns the texts of a golden file without what stands behind their end token.
fn texts(expected: &Tensors, end: u32) -> Vec<Vec<u32>> {
    let [_, length] = *expected.shape("input_ids") else { unreachable!("[texts, tokens]") };
    let ids: Vec<u32> = expected.integers("input_ids").iter().map(|id| *id as u32).collect();
    let cut = |row: &[u32]| {
        let place = row.iter().position(|id| *id == end).unwrap();
        row[..=place].to_vec()
    };
    ids.chunks(length).map(cut).collect()
}

fn text(tokens: Vec<u32>) -> Document {
    Document { learn: vec![false; tokens.len()], tokens, ..Document::default() }
}

#[test]
fn vit_with_classes_with_a_pooler_and_bare() {
    for (name, output) in
        [("vit_classes", "logits"), ("vit_pooler", "embeddings"), ("vit_bare", "embeddings")]
    {
        let (checkpoint, expected) = case(name);
        let documents = images(checkpoint.model.spec().image().unwrap(), &expected);
        let batch = Batch::new(&documents).unwrap();
        let source = &checkpoint.source;
        let found = outputs(&*checkpoint.model, source, &batch, Packing::default()).unwrap();
        assert_close(name, &found, &expected.floats(output), TOLERANCE);
    }
}

#[test]
fn a_bare_vit_becomes_a_classifier_with_a_new_head() {
    let labels: Vec<String> = ["cat", "dog"].map(str::to_owned).into();
    let task = Task::Classify { labels };
    let path = folder("images").join("vit_pooler");
    let checkpoint = open_for(&path, &task, retune_core::random::Seed(1)).unwrap();
    assert_eq!(checkpoint.fresh, ["classifier.bias", "classifier.weight"]);
    // A classifier reads the class token itself.
    assert_eq!(checkpoint.unused, ["vit.pooler.dense.bias", "vit.pooler.dense.weight"]);
    let clip = open_for(&folder("images").join("clip"), &task, retune_core::random::Seed(1));
    assert!(clip.unwrap_err().to_string().contains("its classes are texts"));
}

fn pairs(checkpoint: &Checkpoint, documents: &[Document]) -> Box<Pairs> {
    let (model, device) = (&*checkpoint.model, Device::flex());
    let source = Arc::clone(&checkpoint.source);
    let weights =
        Weights::new(source, Arc::clone(model.spec()), Packing::default(), &device).unwrap();
    let (changes, parameters) = (Changes::default(), Parameters::new(&device));
    let tuned = Tuned { model, weights: &weights, changes: &changes, parameters: &parameters };
    let batch = Batch::new(documents).unwrap();
    let found = tuned.evaluate(&batch, None, |_, output| match output {
        Output::Pairs(pairs) => Ok(pairs),
        _ => unreachable!("CLIP gives pairs"),
    });
    found.unwrap()
}

/// Images and texts as documents of their own, in one order and in another, and as pairs.
#[test]
fn clip_vectors_and_similarities() {
    for name in ["clip", "clip_legacy"] {
        let (checkpoint, expected) = case(name);
        let images = images(checkpoint.model.spec().image().unwrap(), &expected);
        let texts = texts(&expected, 39);
        let own: Vec<Document> = texts.iter().cloned().map(text).collect();
        let check = |found: &Pairs, what: &str| {
            let close = |part: &str, found: &tensor::Tensor<2>| {
                let found = to_vec(found.clone());
                let what = format!("{name} {part} of {what}");
                assert_close(&what, &found, &expected.floats(part), TOLERANCE);
            };
            close("image_embeds", &found.images);
            close("text_embeds", &found.texts);
            close("logits", &found.similarities());
        };
        check(&pairs(&checkpoint, &[&images[..], &own[..]].concat()), "images first");
        check(&pairs(&checkpoint, &[&own[..], &images[..]].concat()), "texts first");
        let both = images.iter().zip(&texts).map(|(image, text)| {
            let tokens: Vec<u32> = image.tokens.iter().chain(text).copied().collect();
            Document { learn: vec![false; tokens.len()], tokens, ..image.clone() }
        });
        let both: Vec<Document> = both.chain([own[3].clone()]).collect();
        check(&pairs(&checkpoint, &both), "images with their texts");
    }
}

/// The loss of two pairs, from the similarities by hand: the mean of both directions.
#[test]
fn the_contrastive_loss_is_the_mean_of_both_directions() {
    let (checkpoint, expected) = case("clip");
    let images = images(checkpoint.model.spec().image().unwrap(), &expected);
    let texts = texts(&expected, 39);
    let pair = |i: usize| {
        let tokens: Vec<u32> = images[i].tokens.iter().chain(&texts[i]).copied().collect();
        Document { learn: vec![false; tokens.len()], tokens, ..images[i].clone() }
    };
    let documents = [pair(0), pair(1)];
    let losses = to_vec(pairs(&checkpoint, &documents).losses(&Batch::new(&documents).unwrap()));
    let logits = expected.floats("logits");
    // Similarities [image, text] of the first two of each; there are four texts.
    let s = |image: usize, text: usize| f64::from(logits[image * 4 + text]);
    let minus_log = |right: f64, wrong: f64| (1.0 + (wrong - right).exp()).ln();
    let expected = [
        0.5 * (minus_log(s(0, 0), s(0, 1)) + minus_log(s(0, 0), s(1, 0))),
        0.5 * (minus_log(s(1, 1), s(1, 0)) + minus_log(s(1, 1), s(0, 1))),
    ];
    assert_close("losses", &losses, &expected.map(|loss| loss as f32), TOLERANCE);
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let (checkpoint, expected) = case("clip");
    let spec = checkpoint.model.spec();
    let image = images(spec.image().unwrap(), &expected).remove(0);
    let check = |documents: &[Document]| {
        Batch::new(documents).and_then(|batch| batch.check(spec, 0)).unwrap_err().to_string()
    };
    let cut = Document { tokens: vec![IMAGE; 3], learn: vec![false; 3], ..image.clone() };
    assert!(check(&[cut]).contains("10 rows"));
    let thin = Document { pixels: vec![0.0; 5], ..image.clone() };
    assert!(check(&[thin]).contains("48 numbers for each of 9 patches"));
    let (vit, _) = case("vit_bare");
    let words = text(vec![1, 2]);
    let error = Batch::new(&[words]).unwrap().check(vit.model.spec(), 0).unwrap_err();
    assert!(error.to_string().contains("does not know"), "{error}");
    let llama = open(&folder("training/llama/base")).unwrap();
    let error = Batch::new(&[image]).unwrap().check(llama.model.spec(), 0).unwrap_err();
    assert!(error.to_string().contains("reads no images"), "{error}");
}

#[test]
fn impossible_configurations_are_refused_by_their_key() {
    use retune_models::{build, config::Config};
    use retune_testkit::tiny::image_configs;
    use serde_json::{Value, json};
    let refuse = |name: &str, part: &str, key: &str, value: Value| {
        let mut config = image_configs().into_iter().find(|(n, _)| *n == name).unwrap().1;
        let place = if part.is_empty() { &mut config } else { &mut config[part] };
        place[key] = value;
        let error = build(&Config::new(std::path::Path::new("config.json"), config)).unwrap_err();
        assert!(error.to_string().contains(&format!("`{key}`")), "{name} {key}: {error}");
    };
    for (part, name) in [("", "vit classes"), ("vision_config", "clip")] {
        refuse(name, part, "patch_size", json!(3));
        refuse(name, part, "image_size", json!([8]));
        refuse(name, part, "image_size", json!(0));
        refuse(name, part, "num_channels", json!(1 << 30));
        refuse(name, part, "num_attention_heads", json!(5));
        refuse(name, part, "num_hidden_layers", json!(100_000));
    }
    refuse("clip", "", "vision_config", json!(7));
    refuse("clip", "text_config", "eos_token_id", json!(-1));
    refuse("vit classes", "", "hidden_act", json!("sine"));
}
