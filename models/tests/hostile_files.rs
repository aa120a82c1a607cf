//! Every reader of the data module, fed files that are cut short, bit-flipped or made to claim what they do not hold:
//! no panic, and no more memory than a small file is worth. The cases are the same in every run.

use kiln_models::data::idx::{parse_idx, read_idx};
use kiln_models::data::{CsvOptions, Dataset, FolderOptions, ImageFolder, Label, Mnist, Rng, Source, read_csv};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the bytes in use and their peak.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` unchanged, which keeps the contract; the counters do not touch the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(used, Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise about `pointer` and `layout` is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Every file here is below 16 KiB. Deflate and JPEG may honestly blow such a file up a thousandfold, but none of the valid files
/// that the cases are made from does; a decoder's fixed tables take most of this.
const MOST: usize = 8 << 20;

/// What the cases are counted and bounded by.
#[derive(Default)]
struct Tally {
    cases: usize,
    refused: usize,
}

impl Tally {
    /// Runs one case, which says whether its file was refused.
    fn case<T, E>(&mut self, what: &str, read: impl FnOnce() -> Result<T, E>) {
        let before = USED.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        self.refused += usize::from(read().is_err());
        let grown = PEAK.load(Ordering::Relaxed).saturating_sub(before);
        assert!(grown <= MOST, "case {}, {what}: {grown} bytes were allocated", self.cases);
        self.cases += 1;
    }
}

/// A damaged copy: cut short, some bits flipped, some bytes replaced by extreme ones, or a piece repeated.
fn damage(valid: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = valid.to_vec();
    match rng.below(5) {
        0 => bytes.truncate(rng.below(valid.len())),
        1 => {
            let at = rng.below(valid.len());
            bytes.splice(at..at, valid[rng.below(at + 1)..at].to_vec());
        }
        2 => {
            // Extreme values at the front, where headers are.
            for _ in 0..=rng.below(8) {
                bytes[rng.below(valid.len().min(48))] = [0, 1, 0x7f, 0x80, 0xff][rng.below(5)];
            }
        }
        _ => {
            for _ in 0..=rng.below(6) {
                bytes[rng.below(valid.len())] ^= 1 << rng.below(8);
            }
        }
    }
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An IDX file of the type `code` whose elements are `size` bytes each.
fn idx(code: u8, size: usize, shape: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0, 0, code, shape.len() as u8];
    shape.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
    bytes.extend((0..size * shape.iter().product::<u32>() as usize).map(|i| (i % 10) as u8));
    bytes
}

/// A fresh folder.
fn temporary() -> PathBuf {
    let path = std::env::temp_dir().join(format!("kiln-hostile-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

fn idx_cases(tally: &mut Tally, rng: &mut Rng) {
    for (code, size) in [(8, 1), (9, 1), (0xB, 2), (0xC, 4), (0xD, 4), (0xE, 8)] {
        let plain = idx(code, size, &[5, 4, 3]);
        let packed = gzip(&plain);
        for length in 0..plain.len() {
            tally.case("IDX cut short", || parse_idx(&plain[..length], "x"));
        }
        for length in 0..packed.len() {
            tally.case("IDX in gzip cut short", || parse_idx(&packed[..length], "x"));
        }
        for _ in 0..400 {
            let (plain, packed, inside) = (damage(&plain, rng), damage(&packed, rng), gzip(&damage(&plain, rng)));
            tally.case("damaged IDX", || parse_idx(&plain, "x"));
            tally.case("damaged gzip", || parse_idx(&packed, "x"));
            tally.case("gzip of damaged IDX", || parse_idx(&inside, "x"));
        }
    }
    // Honest gzip of a header that claims what a file of this size could hold only if it were all zeros.
    for claim in [1 << 20, 1 << 24, 1 << 28, u32::MAX] {
        let mut bytes = idx(8, 1, &[0, 1]);
        bytes[4..8].copy_from_slice(&claim.to_be_bytes());
        tally.case("IDX that claims much", || parse_idx(&bytes, "x"));
        tally.case("gzipped IDX that claims much", || parse_idx(&gzip(&bytes), "x"));
    }
}

fn mnist_cases(tally: &mut Tally, rng: &mut Rng, root: &Path) {
    let folder = root.join("mnist");
    fs::create_dir_all(&folder).unwrap();
    let (images, labels) = (idx(8, 1, &[3, 28, 28]), idx(8, 1, &[3]));
    for _ in 0..600 {
        let images = if rng.below(2) == 0 { damage(&images, rng) } else { images.clone() };
        fs::write(folder.join("t10k-images-idx3-ubyte"), images).unwrap();
        fs::write(folder.join("t10k-labels-idx1-ubyte"), damage(&labels, rng)).unwrap();
        tally.case("MNIST folder", || Mnist::open(Source::Folder(folder.clone())));
        tally.case("IDX file", || read_idx(folder.join("t10k-images-idx3-ubyte")));
    }
}

fn csv_cases(tally: &mut Tally, rng: &mut Rng, root: &Path) {
    let path = root.join("table.csv");
    let valid: String = (0..40).map(|i| format!("{i},{}.5,\"a \"\"{}\"\"\",-{i}e3\n", i * 7, i % 3)).collect();
    let valid = format!("a,b,kind,c\n{valid}").into_bytes();
    for i in 0..2000 {
        fs::write(&path, damage(&valid, rng)).unwrap();
        let label = [Label::None, Label::Last, Label::Index(2), Label::Name("kind".to_owned())][i % 4].clone();
        let options = CsvOptions { header: i % 3 > 0, label, ..Default::default() };
        tally.case("CSV", || read_csv(&path, &options));
    }
}

/// PNG chunks with their checksums made right, so that damage gets past them.
fn repair_png(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut at = 8;
    while let Some(length) = bytes.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize) {
        let Some(end) = length.checked_add(at + 8).filter(|&end| end + 4 <= bytes.len()) else { break };
        let mut crc = flate2::Crc::new();
        crc.update(&bytes[at + 4..end]);
        bytes[end..end + 4].copy_from_slice(&crc.sum().to_be_bytes());
        at = end + 4;
    }
    bytes
}

fn image_cases(tally: &mut Tally, rng: &mut Rng, root: &Path) {
    let folder = root.join("images");
    fs::create_dir_all(folder.join("class")).unwrap();
    let picture = image::RgbImage::from_fn(24, 20, |x, y| image::Rgb([(x * 9) as u8, (y * 11) as u8, (x * y) as u8]));
    for (name, count) in [("a.png", 2500), ("a.jpg", 2500)] {
        let path = folder.join("class").join(name);
        picture.save(&path).unwrap();
        let valid = fs::read(&path).unwrap();
        let open = |size| ImageFolder::open(&folder, FolderOptions { size, ..Default::default() }).unwrap();
        let sets = [open(None), open(Some((16, 16)))];
        for i in 0..count {
            let damaged = damage(&valid, rng);
            fs::write(&path, if i % 4 > 0 && name == "a.png" { repair_png(damaged) } else { damaged }).unwrap();
            tally.case(name, || sets[i % 2].batch(&[0], &mut Rng::new(0)));
        }
        // Width and height stand at these places in the headers.
        for side in [[0u8, 0], [0, 1], [0x10, 0], [0x7f, 0xff], [0xff, 0xff]] {
            let mut bytes = valid.clone();
            if name == "a.png" {
                bytes[16..20].copy_from_slice(&[side[0], side[1], side[0], side[1]]);
                bytes[20..24].copy_from_slice(&[0, 0, side[0], side[1]]);
                bytes = repair_png(bytes);
            } else if let Some(frame) = bytes.windows(2).position(|w| w == [0xff, 0xc0]) {
                bytes[frame + 5..frame + 9].copy_from_slice(&[side[0], side[1], side[0], side[1]]);
            }
            fs::write(&path, bytes).unwrap();
            tally.case("an image that claims much", || sets[0].batch(&[0], &mut Rng::new(0)));
        }
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn no_file_makes_a_reader_panic_or_take_much_memory() {
    let root = temporary();
    let mut tally = Tally::default();
    let mut rng = Rng::new(20);
    idx_cases(&mut tally, &mut rng);
    mnist_cases(&mut tally, &mut rng, &root);
    csv_cases(&mut tally, &mut rng, &root);
    image_cases(&mut tally, &mut rng, &root);
    fs::remove_dir_all(&root).unwrap();
    println!("{} cases, {} refused", tally.cases, tally.refused);
    assert!(tally.cases >= 10_000, "{} cases", tally.cases);
}
