//! MNIST and Fashion-MNIST, found wherever they are, and handwritten-looking digits where they are not.

use super::dataset::Dataset;
use super::digits;
use super::download::{self, Remote};
use super::error;
use super::idx::{IdxData, IdxReader};
use super::images::ImageSet;
use kiln_tensor::Result;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

/// Where to look for a data set.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Source {
    /// The folder that the environment variable `KILN_DATA` names, Kiln's cache folder, a download into it; generated digits
    /// if none of these works.
    #[default]
    Auto,
    /// As `Auto`, without the download.
    Offline,
    /// This folder and nothing else.
    Folder(PathBuf),
    /// Generated digits.
    Generated {
        /// The seed of all randomness in them.
        seed: u64,
        /// Images in the training set.
        train: usize,
        /// Images in the test set.
        test: usize,
    },
}

/// Where a data set was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In the folder that was asked for.
    Folder(PathBuf),
    /// In this folder, through `KILN_DATA`.
    Environment(PathBuf),
    /// In Kiln's cache folder.
    Cache(PathBuf),
    /// It was downloaded into this folder just now.
    Download(PathBuf),
    /// It is made up: handwritten-looking digits of this seed.
    Generated(u64),
}

/// How training and test set relate to the published ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// As published: 60,000 for training and 10,000 for tests.
    Full,
    /// The 60,000 were not there: of the 10,000, each tenth image (9, 19, 29, …) is a test image, the others are for training.
    TestImagesOnly,
    /// Training and test images are generated, from different seeds.
    Generated,
}

/// Handwritten digits (LeCun, Cortes, Burges 1998): 28 × 28, one channel, ten classes.
#[derive(Clone, Debug)]
pub struct Mnist {
    /// The images to train on.
    pub train: ImageSet,
    /// The images to test on.
    pub test: ImageSet,
    /// Where they come from.
    pub origin: Origin,
    /// Which images they are.
    pub split: Split,
}

/// Pictures of clothes (Xiao, Rasul, Vollgraf 2017) in the format of MNIST; [`Mnist`] describes the fields.
///
/// Where nothing else is found it holds the same generated digits as [`Mnist`]: say so where you show them.
#[derive(Clone, Debug)]
pub struct FashionMnist(pub Mnist);

impl Mnist {
    /// Opens MNIST; [`Source`] says where it is looked for, and the result's `Display` what was found.
    ///
    /// # Errors
    /// If a folder holds a wrong or damaged file (a file that is missing is no error unless that very folder was asked for).
    pub fn open(source: Source) -> Result<Self> {
        open(&MNIST, source, std::env::var_os("KILN_DATA").map(PathBuf::from), cache_folder())
    }
}

impl FashionMnist {
    /// The classes' names, by number.
    pub const CLASSES: [&str; 10] =
        ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"];

    /// Opens Fashion-MNIST as [`Mnist::open`] opens MNIST.
    ///
    /// # Errors
    /// As [`Mnist::open`].
    pub fn open(source: Source) -> Result<Self> {
        open(&FASHION_MNIST, source, std::env::var_os("KILN_DATA").map(PathBuf::from), cache_folder()).map(Self)
    }
}

impl fmt::Display for Mnist {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {} training and {} test images", self.origin, self.train.len(), self.test.len())?;
        match self.split {
            Split::Full | Split::Generated => Ok(()),
            Split::TestImagesOnly => f.write_str(" (only the published test images were there; each tenth of them is kept for tests)"),
        }
    }
}

impl fmt::Display for FashionMnist {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::Environment(path) => write!(f, "{} (from KILN_DATA)", path.display()),
            Self::Cache(path) => write!(f, "{} (cached)", path.display()),
            Self::Download(path) => write!(f, "downloaded to {}", path.display()),
            Self::Generated(seed) => write!(f, "generated digits, seed {seed} (no real data was found or wanted)"),
        }
    }
}

/// A data set of the family.
struct Family {
    /// The name of its folder.
    folder: &'static str,
    /// Where it can be downloaded from.
    mirrors: &'static [&'static str],
    /// Training images and labels, test images and labels.
    files: [Remote; 4],
}

static MNIST: Family = Family {
    folder: "mnist",
    mirrors: &["http://ossci-datasets.s3.amazonaws.com/mnist/", "http://storage.googleapis.com/cvdf-datasets/mnist/"],
    files: [
        Remote {
            name: "train-images-idx3-ubyte.gz",
            sha256: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            bytes: 9_912_422,
        },
        Remote {
            name: "train-labels-idx1-ubyte.gz",
            sha256: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            bytes: 28_881,
        },
        Remote {
            name: "t10k-images-idx3-ubyte.gz",
            sha256: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            bytes: 1_648_877,
        },
        Remote {
            name: "t10k-labels-idx1-ubyte.gz",
            sha256: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            bytes: 4_542,
        },
    ],
};

static FASHION_MNIST: Family = Family {
    folder: "fashion-mnist",
    mirrors: &["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
    files: [
        Remote {
            name: "train-images-idx3-ubyte.gz",
            sha256: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            bytes: 26_421_880,
        },
        Remote {
            name: "train-labels-idx1-ubyte.gz",
            sha256: "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            bytes: 29_515,
        },
        Remote {
            name: "t10k-images-idx3-ubyte.gz",
            sha256: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            bytes: 4_422_102,
        },
        Remote {
            name: "t10k-labels-idx1-ubyte.gz",
            sha256: "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            bytes: 5_148,
        },
    ],
};

/// No set of the family has more images in a file.
const MAX_IMAGES: usize = 60_000;
/// Height and width of every image.
const SIDE: usize = 28;
/// The generated set that stands in for a missing one: enough to train on, made in about a second.
const STAND_IN: (u64, usize, usize) = (0, 20_000, 4_000);

/// Kiln's cache folder: `$KILN_CACHE`, else `$XDG_CACHE_HOME/kiln`, else `~/.cache/kiln` (`%LOCALAPPDATA%\kiln` on Windows).
pub(super) fn cache_folder() -> Option<PathBuf> {
    cache_folder_of(std::env::var_os)
}

/// [`cache_folder`] of an environment that has these variables.
fn cache_folder_of(variable: impl Fn(&'static str) -> Option<OsString>) -> Option<PathBuf> {
    let of = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = || of("XDG_CACHE_HOME").or_else(|| of("LOCALAPPDATA")).or_else(|| of("HOME").map(|home| home.join(".cache")));
    of("KILN_CACHE").or_else(|| user().map(|user| user.join("kiln")))
}

/// The places in their order, until one has the data.
fn open(family: &Family, source: Source, environment: Option<PathBuf>, cache: Option<PathBuf>) -> Result<Mnist> {
    let download = match source {
        Source::Auto => true,
        Source::Offline => false,
        Source::Folder(folder) => {
            let found = read_folder(family, &folder)?;
            let missing = || error::format(&folder, family.files[2].name, "this folder was asked for and lacks this file");
            let (split, [train, test]) = found.ok_or_else(missing)?;
            return Ok(Mnist { train, test, origin: Origin::Folder(folder), split });
        }
        Source::Generated { seed, train, test } => return generate(seed, train, test),
    };
    let given = environment.iter().flat_map(|root| [root.join(family.folder), root.clone()]).map(Origin::Environment);
    let cache = cache.map(|cache| cache.join(family.folder));
    for origin in given.chain(cache.clone().map(Origin::Cache)) {
        let (Origin::Environment(folder) | Origin::Cache(folder)) = &origin else { continue };
        if let Some((split, [train, test])) = read_folder(family, folder)? {
            return Ok(Mnist { train, test, origin, split });
        }
    }
    if let (true, Some(folder)) = (download, cache)
        && family.files.iter().try_for_each(|file| download::fetch(file, family.mirrors, &folder)).is_ok()
        && let Some((split, [train, test])) = read_folder(family, &folder)?
    {
        return Ok(Mnist { train, test, origin: Origin::Download(folder), split });
    }
    let (seed, train, test) = STAND_IN;
    generate(seed, train, test)
}

/// Training and test set from the files in `folder`; `None` if it lacks the test images.
fn read_folder(family: &Family, folder: &Path) -> Result<Option<(Split, [ImageSet; 2])>> {
    let [train_images, train_labels, test_images, test_labels] = &family.files;
    let Some(test) = read_pair(folder, test_images.name, test_labels.name)? else { return Ok(None) };
    if let Some(train) = read_pair(folder, train_images.name, train_labels.name)? {
        return Ok(Some((Split::Full, [train, test])));
    }
    let (kept, train): (Vec<usize>, Vec<usize>) = (0..test.len()).partition(|i| i % 10 == 9);
    Ok(Some((Split::TestImagesOnly, [test.select(&train)?, test.select(&kept)?])))
}

/// Images and their labels; `None` if one of the files, plain or gzipped, is not there.
fn read_pair(folder: &Path, images: &str, labels: &str) -> Result<Option<ImageSet>> {
    let find = |name: &str| [folder.join(name), folder.join(name.trim_end_matches(".gz"))].into_iter().find(|path| path.is_file());
    let (Some(images), Some(labels)) = (find(images), find(labels)) else { return Ok(None) };
    let (count, pixels) = read_bytes(&images, &[SIDE, SIDE])?;
    let (labelled, classes) = read_bytes(&labels, &[])?;
    if count != labelled {
        return Err(error::format(&labels, "dimensions", format!("there are {labelled} labels for {count} images")));
    }
    if let Some(wrong) = classes.iter().find(|&&class| class > 9) {
        return Err(error::format(&labels, "elements", format!("found label {wrong}, expected 0 to 9")));
    }
    ImageSet::new(pixels, classes, [1, SIDE, SIDE]).map(Some)
}

/// A file of bytes whose shape is a number of items, which is returned, of shape `item`.
fn read_bytes(path: &Path, item: &[usize]) -> Result<(usize, Vec<u8>)> {
    let reader = IdxReader::open(path)?;
    let count = match reader.shape() {
        [count, rest @ ..] if rest == item && *count <= MAX_IMAGES => *count,
        shape => {
            let problem = format!("found {shape:?}, expected at most {MAX_IMAGES} items of {item:?}");
            return Err(error::format(path, "dimensions", problem));
        }
    };
    match reader.read()?.data {
        IdxData::U8(bytes) => Ok((count, bytes)),
        _ => Err(error::format(path, "magic number", "the elements are not unsigned bytes")),
    }
}

/// Generated digits; the test set's seed is one that no training set of a small seed has.
fn generate(seed: u64, train: usize, test: usize) -> Result<Mnist> {
    let (train, test) = (digits::generate(train, seed)?, digits::generate(test, !seed)?);
    Ok(Mnist { train, test, origin: Origin::Generated(seed), split: Split::Generated })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A fresh folder that is removed at the end.
    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("kiln-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn write(folder: &Path, prefix: &str, count: u32, labels: &[u8]) {
        fs::create_dir_all(folder).unwrap();
        let mut images = vec![0, 0, 8, 3];
        [count, 28, 28].iter().for_each(|d| images.extend(d.to_be_bytes()));
        images.extend((0..count as usize * 784).map(|i| (i / 784) as u8));
        fs::write(folder.join(format!("{prefix}-images-idx3-ubyte")), images).unwrap();
        let mut file = vec![0, 0, 8, 1];
        file.extend((labels.len() as u32).to_be_bytes());
        file.extend(labels);
        fs::write(folder.join(format!("{prefix}-labels-idx1-ubyte")), file).unwrap();
    }

    #[test]
    fn looks_in_each_place_in_order() {
        let root = Temporary::new("mnist-order");
        let (environment, cache) = (root.0.join("env"), root.0.join("cache"));
        let open_here = || open(&MNIST, Source::Offline, Some(environment.clone()), Some(cache.clone())).unwrap();
        assert_eq!(open_here().origin, Origin::Generated(0));
        write(&cache.join("mnist"), "t10k", 20, &[7; 20]);
        let found = open_here();
        assert_eq!((found.origin, found.split), (Origin::Cache(cache.join("mnist")), Split::TestImagesOnly));
        assert_eq!((found.train.len(), found.test.len()), (18, 2));
        assert_eq!((found.test.pixels()[0], found.test.pixels()[784]), (9, 19));
        write(&environment, "t10k", 20, &[7; 20]);
        write(&environment, "train", 30, &[7; 30]);
        let found = open_here();
        assert_eq!((found.origin.clone(), found.split), (Origin::Environment(environment.clone()), Split::Full));
        assert_eq!((found.train.len(), found.test.len()), (30, 20));
        assert!(found.to_string().ends_with("(from KILN_DATA): 30 training and 20 test images"), "{found}");
        let given = open(&MNIST, Source::Folder(cache.join("mnist")), Some(environment), None).unwrap();
        assert_eq!(given.origin, Origin::Folder(cache.join("mnist")));
    }

    #[test]
    fn the_cache_folder_is_the_one_that_is_named_or_the_users() {
        let folder = |variables: &[(&str, &str)]| {
            cache_folder_of(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(*value)))
        };
        let (home, user, named) = (("HOME", "home"), ("XDG_CACHE_HOME", "user"), ("KILN_CACHE", "named"));
        assert_eq!(folder(&[home, user, named]), Some(PathBuf::from("named")));
        assert_eq!(folder(&[home, user, ("KILN_CACHE", "")]), Some(Path::new("user").join("kiln")));
        assert_eq!(folder(&[home]), Some(Path::new("home").join(".cache").join("kiln")));
        assert_eq!(folder(&[]), None);
    }

    #[test]
    fn damaged_files_are_errors_and_never_replaced_in_silence() {
        let root = Temporary::new("mnist-damaged");
        let error = |labels: &[u8]| {
            write(&root.0, "t10k", 20, labels);
            open(&MNIST, Source::Offline, Some(root.0.clone()), None).unwrap_err().to_string()
        };
        assert!(error(&[7; 19]).contains("there are 19 labels for 20 images"));
        assert!(error(&[10; 20]).contains("found label 10"));
        assert!(open(&MNIST, Source::Folder(root.0.join("nowhere")), None, None).is_err());
    }
}
