//! Tensors written and read back, in every format and dtype.

use kiln_kernels::element::Element;
use kiln_tensor::io::{npy, npz, safetensors, write_atomic};
use kiln_tensor::{DType, Error, Result, Tensor};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// A fresh folder that is removed at the end.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kiln-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Tensors of every dtype: a matrix, a transposed view, a slice with gaps, a scalar and an empty one.
fn samples() -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for dtype in DType::ALL {
        let matrix = Tensor::arange(0., 12., 1., dtype)?.reshape([3, 4])?;
        tensors.insert(format!("{dtype}.transposed"), matrix.permute(&[1, 0])?);
        tensors.insert(format!("{dtype}.gaps"), matrix.with_gaps()?);
        tensors.insert(format!("{dtype}.matrix"), matrix);
        tensors.insert(format!("{dtype}.scalar"), Tensor::scalar(1., dtype)?);
        tensors.insert(format!("{dtype}.empty"), Tensor::zeros([2, 0, 3], dtype)?);
    }
    let special = vec![f32::NAN, f32::INFINITY, -0.0, f32::MIN_POSITIVE / 2.0];
    tensors.insert("special \"name\" ü".to_owned(), Tensor::from_vec(special, 4)?);
    Ok(tensors)
}

/// The same dtype, shape and bits (as f64, which is exact for these values but for NaN's payload).
fn assert_same(name: &str, a: &Tensor, b: &Tensor) -> Result<()> {
    assert_eq!((a.dtype(), a.dims()), (b.dtype(), b.dims()), "{name}");
    let bits = |t: &Tensor| -> Result<Vec<u64>> {
        let dense = t.contiguous()?;
        kiln_tensor::for_any!(t.dtype(), T => {
            Ok(dense.as_slice::<T>()?.iter().map(|x| x.to_f64().to_bits()).collect())
        })
    };
    assert_eq!(bits(a)?, bits(b)?, "{name}");
    Ok(())
}

#[test]
fn safetensors_keeps_everything() -> Result<()> {
    let folder = Temporary::new("safetensors");
    let (tensors, path) = (samples()?, folder.file("new/folder/a.safetensors"));
    let metadata = BTreeMap::from([("epoch".to_owned(), "3".to_owned()), ("a \"b\"".to_owned(), "\n".to_owned())]);
    safetensors::save(&path, &tensors, &metadata)?;
    let first = fs::read(&path).unwrap();
    safetensors::save(&path, &tensors, &metadata)?;
    assert_eq!(first, fs::read(&path).unwrap(), "the same content gave other bytes");
    let loaded = safetensors::load(&path)?;
    assert_eq!(loaded.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
    for (name, tensor) in &tensors {
        assert_same(name, tensor, &loaded[name])?;
    }
    let file = safetensors::SafetensorsFile::open(&path)?;
    assert_eq!(file.metadata(), metadata);
    assert_eq!(file.info("f16.gaps")?, (tensors["f16.gaps"].shape().to_owned(), DType::F16));
    assert!(file.tensor("nothing").err().is_some_and(|e| e.to_string().contains("holds no tensor \"nothing\"")));
    let twice = [("x", &loaded["f32.matrix"]), ("x", &loaded["f32.matrix"])];
    assert!(safetensors::save(&path, twice, &metadata).is_err());
    assert!(safetensors::save(&path, [("__metadata__", &loaded["f32.matrix"])], &metadata).is_err());
    Ok(())
}

#[test]
fn npy_and_npz_keep_everything() -> Result<()> {
    let folder = Temporary::new("npy");
    let tensors = samples()?;
    for (name, tensor) in &tensors {
        let path = folder.file("a.npy");
        npy::save(&path, tensor)?;
        assert_eq!((fs::read(&path).unwrap().len() - tensor.numel() * tensor.dtype().size()) % 64, 0);
        assert_same(name, tensor, &npy::load(&path)?)?;
    }
    let path = folder.file("a.npz");
    npz::save(&path, &tensors)?;
    let loaded = npz::load(&path)?;
    assert_eq!(loaded.len(), tensors.len());
    for (name, tensor) in &tensors {
        assert_same(name, tensor, &loaded[name])?;
    }
    Ok(())
}

#[test]
fn a_failed_write_leaves_the_old_file_and_nothing_else() {
    let folder = Temporary::new("atomic");
    let path = folder.file("a.txt");
    let write = |text: &'static str, fail: bool| {
        write_atomic(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes()).map_err(|e| Error::io("write", "a", e))?;
            if fail { Err(Error::argument("write", "changed my mind")) } else { Ok(()) }
        })
    };
    write("old", false).unwrap();
    assert_eq!(write("new", true).unwrap_err().to_string(), "write: changed my mind");
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    write("new", false).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
    assert!(write_atomic("/", |_| Ok(())).is_err());
    assert!(npy::load(folder.file("nothing.npy")).err().is_some_and(|e| e.to_string().contains("nothing.npy")));
}
