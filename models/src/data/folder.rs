//! Image folders: one subfolder a class, PNG or JPEG files in it, decoded as batches ask for them.

use super::dataset::{Dataset, check_indices};
use super::error;
use super::images::{ImageBatch, Scale};
use super::rng::Rng;
use image::imageops::FilterType;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use kiln_tensor::{Error, Result, Tensor};
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

/// Files that are larger are refused.
const MAX_FILE: u64 = 256 << 20;
/// A decoded image that takes more bytes is refused.
const MAX_DECODED: u64 = 512 << 20;
/// How much larger than its file a decoded image may be: what PNG's deflate can reach. A JPEG's
/// blocks are checked apart.
const MAX_RATIO: u64 = 1032;
/// What a decoder may use beyond the image itself.
const WORKSPACE: u64 = 1 << 20;

/// How an image folder is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderOptions {
    /// Height and width: each image is scaled until it covers them and cropped about its centre.
    /// Without it all images of a batch must have one size.
    pub size: Option<(usize, usize)>,
    /// 1 for grey, 3 for red, green and blue.
    pub channels: usize,
    /// The range of the pixels in batches.
    pub scale: Scale,
}

impl Default for FolderOptions {
    /// Three channels in [0, 1], every image in its own size.
    fn default() -> Self {
        Self { size: None, channels: 3, scale: Scale::Unit }
    }
}

/// A folder with a subfolder of images for each class.
#[derive(Clone, Debug)]
pub struct ImageFolder {
    files: Vec<(PathBuf, i64)>,
    classes: Vec<String>,
    options: FolderOptions,
}

impl ImageFolder {
    /// Lists the PNG and JPEG files (by extension, in any case) of each subfolder of `root`. Classes and files are numbered
    /// in the order of their names. No image is opened yet.
    ///
    /// # Errors
    /// If a folder cannot be read, there is no image at all, or an option makes no sense.
    pub fn open(root: impl AsRef<Path>, options: FolderOptions) -> Result<Self> {
        let root = root.as_ref();
        if !matches!(options.channels, 1 | 3) || options.size.is_some_and(|(h, w)| h == 0 || w == 0 || h.max(w) > 1 << 14) {
            return Err(Error::argument("image folder", format!("images have 1 or 3 channels and sides of 1 to 16384, not {options:?}")));
        }
        let mut classes = Vec::new();
        let mut files = Vec::new();
        for folder in list(root)?.into_iter().filter(|path| path.is_dir()) {
            let images: Vec<PathBuf> = list(&folder)?.into_iter().filter(|path| is_image(path)).collect();
            files.extend(images.into_iter().map(|path| (path, classes.len() as i64)));
            classes.push(folder.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        if files.is_empty() {
            return Err(error::format(root, "subfolders", "there is no PNG or JPEG file in them; expected CLASS/IMAGE.png"));
        }
        Ok(Self { files, classes, options })
    }

    /// The classes' names, by number.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The images' files and class numbers.
    pub fn files(&self) -> &[(PathBuf, i64)] {
        &self.files
    }
}

impl Dataset for ImageFolder {
    type Batch = ImageBatch;

    fn len(&self) -> usize {
        self.files.len()
    }

    fn batch(&self, indices: &[usize], _rng: &mut Rng) -> Result<ImageBatch> {
        check_indices(indices, self.files.len())?;
        let (mut pixels, mut labels, mut shape) = (Vec::new(), Vec::new(), [0, self.options.channels, 0, 0]);
        for &index in indices {
            let (path, label) = &self.files[index];
            let image = fit(read_image(path)?, self.options.size);
            let (height, width) = (image.height() as usize, image.width() as usize);
            let [count, _, first_height, first_width] = shape;
            if count > 0 && (height, width) != (first_height, first_width) {
                let problem = format!("{height}×{width} in a batch of {first_height}×{first_width}; set FolderOptions::size");
                return Err(error::format(path, "size", problem));
            }
            append(&mut pixels, image, self.options);
            shape = [count + 1, self.options.channels, height, width];
            labels.push(*label);
        }
        Ok(ImageBatch { images: Tensor::from_vec(pixels, shape)?, labels: Tensor::from_vec(labels, indices.len())? })
    }
}

/// What is in a folder, in the order of names.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect());
    let mut entries: Vec<PathBuf> = entries.map_err(|e| error::io("list", folder, e))?;
    entries.sort();
    Ok(entries)
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    matches!(extension.as_deref(), Some("png" | "jpg" | "jpeg")) && path.is_file()
}

/// The image in a PNG or JPEG file.
fn read_image(path: &Path) -> Result<DynamicImage> {
    let bytes = read_bytes(path)?;
    DynamicImage::from_decoder(decoder(&bytes, path)?).map_err(|e| undecodable(path, e))
}

/// The image in a PNG or JPEG file, turned as its EXIF data says that it is to be seen.
pub(crate) fn read_upright(path: &Path) -> Result<DynamicImage> {
    let bytes = read_bytes(path)?;
    let mut decoder = decoder(&bytes, path)?;
    let orientation = decoder.orientation().map_err(|e| undecodable(path, e))?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| undecodable(path, e))?;
    image.apply_orientation(orientation);
    Ok(image)
}

fn undecodable(path: &Path, error: image::ImageError) -> Error {
    error::format(path, "image", error.to_string())
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let size = fs::metadata(path).map_err(|e| error::io("open", path, e))?.len();
    if size > MAX_FILE {
        return Err(error::format(path, "size", format!("the file has {size} bytes, more than the {MAX_FILE} allowed")));
    }
    fs::read(path).map_err(|e| error::io("read", path, e))
}

/// A decoder of PNG or JPEG, whichever the first bytes say, that allocates no more than such a file can fill.
fn decoder(bytes: &[u8], path: &Path) -> Result<impl ImageDecoder> {
    let wrong = |e| undecodable(path, e);
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| error::io("read", path, e))?;
    let jpeg = reader.format() == Some(ImageFormat::Jpeg);
    let mut decoder = reader.into_decoder().map_err(wrong)?;
    let (width, height) = decoder.dimensions();
    // A JPEG spends at least a bit on a block. The decoder's buffers for a row of them take as much as eight rows of pixels'
    // blocks, however low the image is.
    let blocks = if jpeg { u64::from(width.div_ceil(8)) * u64::from(height.div_ceil(8).max(8)) } else { 0 };
    let decoded = decoder.total_bytes();
    let packed = png_bits(bytes).filter(|_| !jpeg).map(|bits| (u64::from(width) * u64::from(height)).saturating_mul(bits) / 8);
    let most = (bytes.len() as u64).saturating_mul(MAX_RATIO).min(MAX_DECODED);
    if decoded > MAX_DECODED || packed.unwrap_or(decoded).min(decoded) > most || blocks > 8 * bytes.len() as u64 {
        let problem = format!("{width}×{height} pixels cannot be in a file of {} bytes, or take more than {MAX_DECODED}", bytes.len());
        return Err(error::format(path, "header", problem));
    }
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(most.max(decoded) + WORKSPACE);
    decoder.set_limits(limits).map_err(wrong)?;
    Ok(decoder)
}

/// The bits that a pixel takes in a PNG before it is compressed, by its header: a mask of one is decoded to eight.
fn png_bits(bytes: &[u8]) -> Option<u64> {
    let (&depth, &colour) = (bytes.get(24)?, bytes.get(25)?);
    let samples = match colour {
        2 => 3,
        4 => 2,
        6 => 4,
        _ => 1,
    };
    Some(samples * u64::from(depth))
}

/// Scales an image until it covers `size` and crops it about its centre.
fn fit(image: DynamicImage, size: Option<(usize, usize)>) -> DynamicImage {
    match size {
        Some((height, width)) if (image.height() as usize, image.width() as usize) != (height, width) => {
            image.resize_to_fill(width as u32, height as u32, FilterType::Triangle)
        }
        _ => image,
    }
}

/// Appends an image in the order channel, row, column.
fn append(images: &mut Vec<f32>, image: DynamicImage, options: FolderOptions) {
    let pixels = if options.channels == 1 { image.into_luma8().into_raw() } else { image.into_rgb8().into_raw() };
    for channel in 0..options.channels {
        images.extend(pixels.iter().skip(channel).step_by(options.channels).map(|&p| options.scale.apply(p)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgb, RgbImage};

    #[test]
    fn reads_classes_scales_and_says_what_is_wrong() {
        let root = std::env::temp_dir().join(format!("kiln-folder-{}", std::process::id()));
        for (class, name, colour, size) in [("cat", "a.png", 255, 4), ("cat", "b.PNG", 51, 4), ("dog", "a.jpg", 102, 8)] {
            fs::create_dir_all(root.join(class)).unwrap();
            RgbImage::from_pixel(size, size, Rgb([colour, 0, colour])).save(root.join(class).join(name)).unwrap();
        }
        fs::write(root.join("cat/readme.txt"), "no image").unwrap();
        let plain = ImageFolder::open(&root, FolderOptions::default()).unwrap();
        assert_eq!((plain.classes(), plain.len()), (&["cat".to_owned(), "dog".to_owned()][..], 3));
        let batch = plain.batch(&[1, 0], &mut Rng::new(0)).unwrap();
        assert_eq!((batch.images.dims(), batch.labels.to_vec::<i64>().unwrap()), (&[2, 3, 4, 4][..], vec![0, 0]));
        let pixels = batch.images.to_vec::<f32>().unwrap();
        assert_eq!([pixels[0], pixels[16], pixels[32], pixels[48]], [0.2, 0.0, 0.2, 1.0]);
        let error = plain.batch(&[0, 2], &mut Rng::new(0)).err().unwrap().to_string();
        assert!(error.contains("8×8 in a batch of 4×4"), "{error}");
        let sized = ImageFolder::open(&root, FolderOptions { size: Some((4, 6)), channels: 1, scale: Scale::Signed }).unwrap();
        assert_eq!(sized.batch(&[0, 1, 2], &mut Rng::new(0)).unwrap().images.dims(), [3, 1, 4, 6]);
        fs::write(root.join("dog/a.jpg"), b"\xff\xd8\xff broken").unwrap();
        assert!(sized.batch(&[2], &mut Rng::new(0)).err().unwrap().to_string().contains("a.jpg: image:"));
        fs::remove_dir_all(&root).unwrap();
        assert!(ImageFolder::open(&root, FolderOptions::default()).is_err());
        assert!(ImageFolder::open(&root, FolderOptions { channels: 2, ..Default::default() }).is_err());
    }

    #[test]
    fn a_mask_of_bits_may_be_a_small_file() {
        let path = std::env::temp_dir().join(format!("kiln-mask-{}.png", std::process::id()));
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 1024, 1024);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.set_depth(png::BitDepth::One);
        encoder.write_header().unwrap().write_image_data(&[0; 128 * 1024]).unwrap();
        assert!(bytes.len() as u64 * MAX_RATIO < 1 << 20, "{} bytes", bytes.len());
        fs::write(&path, &bytes).unwrap();
        let image = read_image(&path);
        fs::remove_file(&path).unwrap();
        let pixels = image.unwrap().into_luma8().into_raw();
        assert!(pixels.len() == 1 << 20 && pixels.iter().all(|&pixel| pixel == 0));
    }
}
