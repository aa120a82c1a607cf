//! PNG files that say how they were drawn.

use super::picture::picture_bytes;
use kiln_tensor::io::write_atomic;
use kiln_tensor::{Error, Result, Tensor};
use png::{BitDepth, ColorType, Decoder, DecodingError, Encoder, Info, Limits};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// The most memory that the texts of a file may take, and the most that the compressed ones may become.
const MAX_TEXT: usize = 64 << 20;

/// Writes a picture (1, 3, H, W) in [−1, 1] with texts by keyword (1 to 79 characters of Latin-1): in `tEXt` chunks, or in `iTXt` where a
/// text is not plain ASCII. The folder is made if it is missing.
///
/// # Errors
/// If the shape is another one, a keyword is none, or the file cannot be written.
pub fn write_png(path: impl AsRef<Path>, picture: &Tensor, texts: &BTreeMap<String, String>) -> Result<()> {
    let path = path.as_ref();
    let (bytes, [height, width]) = picture_bytes(picture)?;
    let extent = |n: usize| u32::try_from(n).map_err(|_| Error::shape("write_png", format!("{} is too large", picture.shape())));
    let (width, height) = (extent(width)?, extent(height)?);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("write_png", folder.display(), e))?;
    }
    let wrong = |e: png::EncodingError| Error::format("write_png", format!("{}: {e}", path.display()));
    write_atomic(path, |file| {
        let mut encoder = Encoder::new(file, width, height);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        for (keyword, text) in texts {
            let added = if text.is_ascii() {
                encoder.add_text_chunk(keyword.clone(), text.clone())
            } else {
                encoder.add_itxt_chunk(keyword.clone(), text.clone())
            };
            added.map_err(wrong)?;
        }
        let mut writer = encoder.write_header().map_err(wrong)?;
        writer.write_image_data(&bytes).map_err(wrong)?;
        writer.finish().map_err(wrong)
    })
}

/// The texts in a PNG file by keyword. The whole file is read: a corrupt one is an error.
///
/// # Errors
/// If the file is missing, no sound PNG, or its texts are too long.
pub fn read_png_text(path: impl AsRef<Path>) -> Result<BTreeMap<String, String>> {
    let path = path.as_ref();
    let wrong = |e: DecodingError| Error::format("read_png_text", format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(|e| Error::io("read_png_text", path.display(), e))?;
    let mut decoder = Decoder::new_with_limits(BufReader::new(file), Limits { bytes: MAX_TEXT });
    decoder.set_ignore_text_chunk(false);
    let mut reader = decoder.read_info().map_err(wrong)?;
    while reader.next_row().map_err(wrong)?.is_some() {}
    reader.finish().map_err(wrong)?;
    texts(reader.info(), MAX_TEXT).map_err(wrong)
}

/// The texts by keyword; an error if the compressed ones have more bytes than `limit` together.
fn texts(info: &Info<'_>, mut limit: usize) -> std::result::Result<BTreeMap<String, String>, DecodingError> {
    let mut texts = BTreeMap::new();
    for chunk in &info.uncompressed_latin1_text {
        texts.insert(chunk.keyword.clone(), chunk.text.clone());
    }
    for chunk in &info.compressed_latin1_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(limit)?;
        let text = chunk.get_text()?;
        limit = limit.saturating_sub(text.len());
        texts.insert(chunk.keyword, text);
    }
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(limit)?;
        let text = chunk.get_text()?;
        limit = limit.saturating_sub(text.len());
        texts.insert(chunk.keyword, text);
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use png::text_metadata::{ITXtChunk, ZTXtChunk};

    #[test]
    fn compressed_texts_are_read_up_to_a_limit_together() {
        let mut info = Info::with_size(1, 1);
        let mut latin = ZTXtChunk::new("a", "x".repeat(1000));
        latin.compress_text().unwrap();
        let mut unicode = ITXtChunk::new("b", "y".repeat(1000));
        unicode.compress_text().unwrap();
        info.compressed_latin1_text.push(latin);
        info.utf8_text.push(unicode);
        let read = texts(&info, 3000).unwrap();
        assert_eq!((read["a"].as_str(), read["b"].as_str()), (&*"x".repeat(1000), &*"y".repeat(1000)));
        assert!(texts(&info, 1999).is_err() && texts(&info, 999).is_err());
    }
}
