//! Files that are whole or not there.

use crate::{Error, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes the file at `path` so that a crash at any moment leaves the old file or the new one, never a part: `write` fills a
/// temporary file in the same folder, which is flushed to the disk and renamed. Missing folders are created.
///
/// # Errors
/// If a folder or file cannot be written, or `write` fails; the temporary file is removed then.
pub fn write_atomic(path: impl AsRef<Path>, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let path = path.as_ref();
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder).map_err(|e| Error::io("write", folder.display(), e))?;
    let temporary = temporary_name(path, folder)?;
    let result = fill(&temporary, write).and_then(|()| fs::rename(&temporary, path).map_err(|e| Error::io("write", path.display(), e)));
    if result.is_err() {
        // The first error is the one to tell; a leftover is harmless.
        let _ = fs::remove_file(&temporary);
    }
    result?;
    sync_folder(folder);
    Ok(())
}

/// A name in `folder` that no other write of this or another process uses.
fn temporary_name(path: &Path, folder: &Path) -> Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| Error::argument("write", format!("{} names no file", path.display())))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    Ok(folder.join(temporary))
}

fn fill(temporary: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let failed = |e| Error::io("write", temporary.display(), e);
    let mut writer = BufWriter::new(File::create(temporary).map_err(failed)?);
    write(&mut writer)?;
    let file = writer.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)
}

/// Makes the rename itself durable where the system lets a folder be opened; elsewhere it is as durable as the system makes it.
fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}
