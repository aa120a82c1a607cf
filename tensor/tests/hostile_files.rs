//! The readers of tensor files, fed files that are cut short, bit-flipped or made to claim what they do not hold:
//! no panic, and no more memory than a small file is worth. The cases are the same in every run.

use kiln_tensor::io::{npy, npz, safetensors};
use kiln_tensor::{DType, Result, Tensor, memory_stats, reset_peak};
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the bytes in use and their peak; tensors' own memory is counted by Kiln.
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

/// Every file here is below 8 KiB, of which deflate could honestly make a thousand times as much.
const MOST: usize = 8 << 20;

/// SplitMix64, to choose the damage.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }
}

/// A damaged copy: cut short, bits flipped, extreme or odd bytes in the first `front` ones, or a piece repeated.
fn damage(valid: &[u8], front: usize, random: &mut Random) -> Vec<u8> {
    const ODD: &[u8] = b"\0\x01\x7f\x80\xff0192,:()[]{}'\"-LeF";
    let mut bytes = valid.to_vec();
    match random.below(5) {
        0 => bytes.truncate(random.below(valid.len())),
        1 => {
            let at = random.below(valid.len());
            bytes.splice(at..at, valid[random.below(at + 1)..at].to_vec());
        }
        2 => {
            for _ in 0..=random.below(6) {
                bytes[random.below(valid.len().min(front))] = ODD[random.below(ODD.len())];
            }
        }
        _ => {
            for _ in 0..=random.below(6) {
                bytes[random.below(valid.len())] ^= 1 << random.below(8);
            }
        }
    }
    bytes
}

/// The reader under test, a place for its files, and how many it was fed.
struct Feeder<'a, T> {
    path: PathBuf,
    read: &'a dyn Fn(&Path) -> Result<T>,
    cases: usize,
}

impl<T> Feeder<'_, T> {
    /// Feeds `bytes`, checks what is allocated for them, and says whether they were refused.
    fn feed(&mut self, bytes: &[u8]) -> bool {
        fs::write(&self.path, bytes).unwrap();
        reset_peak();
        let (heap, tensors) = (USED.load(Ordering::Relaxed), memory_stats().in_use);
        PEAK.store(heap, Ordering::Relaxed);
        let refused = (self.read)(&self.path).is_err();
        let grown = PEAK.load(Ordering::Relaxed).saturating_sub(heap) + memory_stats().peak.saturating_sub(tensors);
        assert!(grown <= MOST, "case {}, {}: {grown} bytes for a file of {}", self.cases, self.path.display(), bytes.len());
        self.cases += 1;
        refused
    }
}

/// A safetensors file of this header, which tells the truth about its own length, and data.
fn safetensors_file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

/// Safetensors files that must all be refused.
fn handmade_safetensors() -> Vec<Vec<u8>> {
    let entry = |dtype: &str, shape: &str, start: u64, end: u64| {
        format!("{{\"x\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}}}")
    };
    let mut files = vec![
        safetensors_file("", 0),
        safetensors_file("[]", 0),
        safetensors_file(&"[".repeat(4000), 0),
        safetensors_file(&entry("F32", "[1]", 0, u64::MAX), 4),
        safetensors_file(&entry("F32", "[1]", u64::MAX, 3), 4),
        safetensors_file(&entry("F32", "[1]", 4, 0), 4),
        safetensors_file(&entry("F32", "[4294967296,4294967296,4]", 0, 0), 0),
        safetensors_file(&entry("F32", "[0,18446744073709551615,18446744073709551615]", 0, 0), 0),
        safetensors_file(&entry("F32", "[1099511627776]", 0, 4_398_046_511_104), 4),
        safetensors_file(&entry("F32", "[1,1,1,1,1,1,1,1,1]", 0, 4), 4),
        safetensors_file(&entry("F8_E4M3", "[4]", 0, 4), 4),
        safetensors_file(&entry("F4", "[1]", 0, 1), 1),
    ];
    for length in [u64::MAX, u64::MAX - 7, 1 << 40, 100_000_000, 9] {
        files.push(length.to_le_bytes().to_vec());
        files.push([&length.to_le_bytes()[..], b"{}"].concat());
    }
    files
}

/// Npy files that must all be refused.
fn handmade_npy() -> Vec<Vec<u8>> {
    let file = |version: u8, header: &str, data: usize| {
        let mut bytes = b"\x93NUMPY".to_vec();
        bytes.extend([version, 0]);
        let length = (header.len() as u32).to_le_bytes();
        bytes.extend(if version == 1 { &length[..2] } else { &length[..] });
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 1);
        bytes
    };
    let header = |shape: &str| format!("{{'descr': '<f8', 'fortran_order': True, 'shape': {shape}}}\n");
    let shapes =
        ["(1099511627776,)", "(18446744073709551615,)", "(4294967296, 4294967296)", "(0, 18446744073709551615, 2)", "(-1,)", "(((("];
    let mut files: Vec<_> = shapes.iter().flat_map(|s| [1, 2, 3, 4].map(|version| file(version, &header(s), 8))).collect();
    files.push(b"\x93NUMPY\x02\0\xff\xff\xff\xff{".to_vec());
    files.push(file(1, &"(".repeat(60_000), 0));
    files
}

#[test]
fn no_file_makes_a_reader_panic_or_take_much_memory() {
    let root = std::env::temp_dir().join(format!("kiln-hostile-tensors-{}", std::process::id()));
    fs::create_dir_all(&root).unwrap();
    let random = &mut Random(21);
    let matrix = |dtype: DType| Tensor::arange(0., 24., 1., dtype).and_then(|t| t.reshape([4, 6])).unwrap();
    let tensors: BTreeMap<String, Tensor> = DType::ALL.iter().map(|&dtype| (dtype.to_string(), matrix(dtype))).collect();

    let mut of_safetensors = Feeder { path: root.join("a.safetensors"), read: &|path| safetensors::load(path), cases: 0 };
    safetensors::save(&of_safetensors.path, &tensors, &BTreeMap::from([("a".to_owned(), "b".to_owned())])).unwrap();
    let valid = fs::read(&of_safetensors.path).unwrap();
    for (i, bytes) in handmade_safetensors().iter().enumerate() {
        assert!(of_safetensors.feed(bytes), "safetensors file {i} was taken");
    }
    for _ in 0..4000 {
        // The header is most of the first kilobyte.
        of_safetensors.feed(&damage(&valid, 700, random));
    }

    let mut of_npy = Feeder { path: root.join("a.npy"), read: &|path| npy::load(path), cases: 0 };
    for (i, bytes) in handmade_npy().iter().enumerate() {
        assert!(of_npy.feed(bytes), "npy file {i} was taken");
    }
    for tensor in tensors.values() {
        npy::save(&of_npy.path, tensor).unwrap();
        let valid = fs::read(&of_npy.path).unwrap();
        for _ in 0..500 {
            of_npy.feed(&damage(&valid, 80, random));
        }
    }

    let mut of_npz = Feeder { path: root.join("a.npz"), read: &|path| npz::load(path), cases: 0 };
    npz::save(&of_npz.path, &tensors).unwrap();
    let valid = fs::read(&of_npz.path).unwrap();
    // The archive's directory stands at its end.
    let directory = valid.len() - 450;
    for _ in 0..4000 {
        let mut bytes = damage(&valid, 200, random);
        if random.below(2) == 0 && bytes.len() > directory {
            let at = directory + random.below(bytes.len() - directory);
            bytes[at] = [0, 0xff, 8, 0x7f][random.below(4)];
        }
        of_npz.feed(&bytes);
    }
    fs::remove_dir_all(&root).unwrap();
    let cases = of_safetensors.cases + of_npy.cases + of_npz.cases;
    println!("{cases} cases");
    assert!(cases >= 12_000, "{cases} cases");
}
