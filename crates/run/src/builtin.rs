//! Models inside the program.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use retune_files::atomic::AtomicFolder;

/// The files of `builtin:tiny`; its folder has the recipe that made it.
const TINY: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../builtin/tiny/config.json")),
    ("model.safetensors", include_bytes!("../builtin/tiny/model.safetensors")),
    ("tokenizer.json", include_bytes!("../builtin/tiny/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../builtin/tiny/tokenizer_config.json")),
];

/// Puts a built-in model into the cache, unless it is there, and returns its folder.
///
/// # Errors
/// If the cache cannot be written.
pub(crate) fn unpack(name: &str, cache: &Path) -> Result<PathBuf> {
    // The version keeps an older program's files from being taken for this one's.
    let folder = cache.join("builtin").join(format!("{name}-{}", env!("CARGO_PKG_VERSION")));
    let whole = TINY.iter().all(|(file, content)| {
        std::fs::metadata(folder.join(file)).is_ok_and(|meta| meta.len() == content.len() as u64)
    });
    if whole {
        return Ok(folder);
    }
    let parent = cache.join("builtin");
    std::fs::create_dir_all(&parent).map_err(|error| Error::io(&parent, "create", error))?;
    let staging = AtomicFolder::create(&folder)?;
    for (file, content) in TINY {
        let path = staging.path().join(file);
        std::fs::write(&path, content).map_err(|error| Error::io(&path, "write", error))?;
    }
    staging.replace()?;
    Ok(folder)
}
