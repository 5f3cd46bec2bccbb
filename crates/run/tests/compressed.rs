//! Compressed adapters and full changes are used as they are, with the numbers of what they hold.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune_core::change::Changes;
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_files::Dtype;
use retune_files::compeft::CompeftFile;
use retune_files::safetensors::{Safetensors, SafetensorsFile, TensorSpec, write_safetensors};
use retune_merge::compeft::Settings;
use retune_merge::update::Update;
use retune_methods::adapter::Adapter;
use retune_methods::compressed::is_drawn;
use retune_methods::lora::initial_factor;
use retune_run::compress::{Base, Compressed};
use retune_run::export::merged;
use retune_testkit::open::weights;
use tensor::Device;

const HALF: Settings = Settings { density: 0.5, alpha: 1.5 };

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden/peft")
}

/// Every weight of the tiny base after an adapter was merged in.
fn merged_weights(adapter: &Adapter, folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = retune_models::open(&pack().join("base")).unwrap();
    let weights = weights(Arc::clone(&checkpoint.source), checkpoint.model.spec());
    let mut parameters = Parameters::new(&Device::flex());
    let changes: Changes =
        adapter.method().unwrap().attach(&weights, &mut parameters, Seed(0)).unwrap();
    adapter.fill(folder, &mut parameters).unwrap();
    let tuned = Tuned {
        model: &*checkpoint.model,
        weights: &weights,
        changes: &changes,
        parameters: &parameters,
    };
    let spec = checkpoint.model.spec();
    spec.weights.iter().map(|w| (w.name.clone(), merged(&tuned, w).unwrap())).collect()
}

#[test]
fn a_compressed_adapter_is_read_like_the_one_it_stands_for() {
    let home = tempfile::tempdir().unwrap();
    let update = Update::adapter(&pack().join("lora")).unwrap();
    let compressed = Compressed::make(&update, HALF, None, None).unwrap();
    let (file, folder) = (home.path().join("a.compeft"), home.path().join("a"));
    compressed.write("lora", &file).unwrap();
    compressed.write("lora", &folder).unwrap();
    assert!(folder.join("README.md").is_file() && folder.join("adapter_config.json").is_file());

    let plain = Adapter::read(&pack().join("lora")).unwrap();
    let signs = CompeftFile::open(&file).unwrap();
    let s = signs.scale();
    for path in [&file, &folder] {
        let found = Adapter::read(path).unwrap();
        assert_eq!(found.config, plain.config);
        assert!(found.tensors.keys().eq(plain.tensors.keys()));
        for (name, (shape, values)) in &found.tensors {
            let (plain_shape, before) = &plain.tensors[name];
            assert_eq!(shape, plain_shape);
            let kept = |v: f32| if v.abs() >= compressed.selection.threshold { s } else { 0.0 };
            for (value, before) in values.iter().zip(before) {
                assert_eq!(*value, kept(*before).copysign(*before));
            }
        }
        assert!(!merged_weights(&found, path).is_empty());
    }
    // Written out, it is an ordinary adapter with the same bits.
    let out = home.path().join("out");
    Adapter::read(&file).unwrap().write(&out, "card").unwrap();
    assert_eq!(Adapter::read(&out).unwrap().tensors, Adapter::read(&file).unwrap().tensors);
}

#[test]
fn a_full_change_is_added_to_its_base() {
    let home = tempfile::tempdir().unwrap();
    let base = Safetensors::open(pack().join("base")).unwrap();
    // A tuned model: one weight changed in two entries, one by a constant, all else as it was.
    let changed: Vec<(TensorSpec, Vec<u8>)> = base
        .tensors()
        .map(|tensor| {
            let mut values = tensor.to_f32().unwrap();
            if tensor.name == "model.layers.0.self_attn.q_proj.weight" {
                values[1] += 0.5;
                values[3] -= 0.25;
            }
            let bytes = Dtype::F32.encode(&values).unwrap();
            (TensorSpec::new(tensor.name, Dtype::F32, tensor.shape), bytes)
        })
        .collect();
    let list: Vec<_> = changed.iter().map(|(spec, bytes)| (spec.clone(), &bytes[..])).collect();
    let tuned = home.path().join("tuned.safetensors");
    write_safetensors(&tuned, &list, &BTreeMap::new()).unwrap();

    let update = Update::full(&tuned, &pack().join("base")).unwrap();
    let total: usize = update.parts().iter().map(|p| p.shape.iter().product::<usize>()).sum();
    let settings = Settings { density: 2.5 / total as f64, alpha: 1.0 };
    let identity = Base { name: "tiny".to_owned(), fingerprint: "abc".to_owned() };
    let compressed = Compressed::make(&update, settings, Some(&identity), None).unwrap();
    let file = home.path().join("change.compeft");
    compressed.write("change", &file).unwrap();

    let adapter = Adapter::read(&file).unwrap();
    let known = adapter.base().unwrap();
    assert_eq!((known.name.as_str(), known.fingerprint.as_str()), ("tiny", "abc"));
    let s = CompeftFile::open(&file).unwrap().scale();
    let found = merged_weights(&adapter, &file);
    for tensor in base.tensors() {
        let mut expected = tensor.to_f32().unwrap();
        if tensor.name == "model.layers.0.self_attn.q_proj.weight" {
            expected[1] += s;
            expected[3] -= s;
        }
        assert_eq!(found[tensor.name], expected, "{}", tensor.name);
    }
}

#[test]
fn a_damaged_file_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let update = Update::adapter(&pack().join("lora")).unwrap();
    let file = home.path().join("a.compeft");
    Compressed::make(&update, HALF, None, None).unwrap().write("lora", &file).unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let error = Adapter::read(&file).unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
    std::fs::write(&file, b"{}").unwrap();
    assert!(Adapter::read(&file).unwrap_err().to_string().contains("no ComPEFT file"));
    assert!(SafetensorsFile::open(&file).is_err());
}

/// What the method draws when it is attached is what is drawn again from names and places alone.
#[test]
fn factors_are_drawn_again_as_they_were() {
    let checkpoint = retune_models::open(&pack().join("base")).unwrap();
    let weights = weights(Arc::clone(&checkpoint.source), checkpoint.model.spec());
    for case in ["lora", "lora_emb"] {
        let method = Adapter::read(&pack().join(case)).unwrap().method().unwrap();
        let mut parameters = Parameters::new(&Device::flex());
        method.attach(&weights, &mut parameters, Seed(9)).unwrap();
        let (mut num_pairs, mut num_drawn) = (0, 0);
        for (id, parameter) in parameters.iter() {
            let name = &parameter.name;
            let first = [".lora_A.weight", ".lora_embedding_A"];
            num_pairs += u64::from(first.iter().any(|end| name.ends_with(end)));
            let found = initial_factor(Seed(9), num_pairs - 1, name, &parameter.shape);
            assert_eq!(found, parameters.values(id), "{case} {name}");
            num_drawn += usize::from(is_drawn(name));
            assert_eq!(found.iter().any(|value| *value != 0.0), is_drawn(name));
        }
        assert!(num_drawn > 0);
    }
}
