//! Texts with a class each, from CSV files.

use crate::data::csv::{classes, wrap};
use crate::data::error;
use kiln_tensor::Result;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Texts and their classes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextClassification {
    /// The texts.
    pub texts: Vec<String>,
    /// A text's class: the index into `classes`.
    pub labels: Vec<i64>,
    /// The classes' names; in numerical order if all are numbers, else in that of the text.
    pub classes: Vec<String>,
}

/// Reads the columns `text` and `label` of the CSV file at `path`, whose first line names the columns; others are left out. Labels are integers or
/// names. `known` are the classes of a training set, whose numbers the labels of a test set are to have; without it they are
/// those that the file has.
///
/// # Errors
/// If the file cannot be read or has no row, a column is missing, a row has another number of fields than the first line, a label is
/// empty or not `known`; the error names the line.
pub fn read_text_csv(path: impl AsRef<Path>, text: &str, label: &str, known: Option<&[String]>) -> Result<TextClassification> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| error::io("open", path, e))?;
    parse(BufReader::new(file), path, [text, label], known)
}

fn parse(input: impl Read, path: &Path, columns: [&str; 2], known: Option<&[String]>) -> Result<TextClassification> {
    let mut reader = csv::ReaderBuilder::new().from_reader(input);
    let header = reader.headers().map_err(|e| wrap(path, e))?.clone();
    let column = |name: &str| {
        let found = header.iter().position(|other| other.trim_start_matches('\u{feff}').trim() == name);
        found.ok_or_else(|| error::format(path, "header", format!("there is no column {name:?} among {}", header.len())))
    };
    let (text, label) = (column(columns[0])?, column(columns[1])?);
    let (mut texts, mut names) = (Vec::new(), Vec::new());
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(|e| wrap(path, e))? {
        let line = record.position().map_or(0, csv::Position::line);
        let name = record.get(label).unwrap_or_default().trim();
        if name.is_empty() {
            return Err(error::line(path, line, format!("column {:?}: there is no label", columns[1])));
        }
        if known.is_some_and(|known| !known.iter().any(|class| class == name)) {
            let shown: String = name.chars().take(40).collect();
            return Err(error::line(path, line, format!("column {:?}: {shown:?} is not a known class", columns[1])));
        }
        texts.push(record.get(text).unwrap_or_default().to_owned());
        names.push(name.to_owned());
    }
    if texts.is_empty() {
        return Err(error::format(path, "rows", "there are none"));
    }
    let (classes, labels) = match known {
        None => classes(&names),
        Some(known) => {
            let number = |name: &String| (0..).zip(known).find(|(_, class)| *class == name).map_or(-1, |(number, _)| number);
            (known.to_vec(), names.iter().map(number).collect())
        }
    };
    Ok(TextClassification { texts, labels, classes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8], known: Option<&[String]>) -> Result<TextClassification> {
        parse(text, Path::new("reviews.csv"), ["text", "label"], known)
    }

    #[test]
    fn labels_are_numbers_or_names() {
        let names = read(b"id,text,label\n1,\"good, very\ngood\",pos\n2, bad ,neg\n3,fine,pos\n", None).unwrap();
        assert_eq!(names.texts, ["good, very\ngood", " bad ", "fine"]);
        assert_eq!((names.labels, names.classes.clone()), (vec![1, 0, 1], vec!["neg".to_owned(), "pos".to_owned()]));
        let numbers = read(b"\xef\xbb\xbflabel,text\n10,a\n9,b\n", None).unwrap();
        assert_eq!((numbers.labels, numbers.classes), (vec![1, 0], vec!["9".to_owned(), "10".to_owned()]));
        let test = read(b"text,label\nx,pos\n", Some(&names.classes)).unwrap();
        assert_eq!((test.labels, test.classes), (vec![1], names.classes));
    }

    #[test]
    fn errors_name_the_line_or_the_column() {
        let known = ["a".to_owned()];
        let cases: [(&[u8], &str); 7] = [
            (b"", "\"text\""),
            (b"text,class\nx,1\n", "\"label\""),
            (b"text,label\n", "rows"),
            (b"text,label\nx,a\ny\n", "line 3"),
            (b"text,label\nx,\n", "line 2"),
            (b"text,label\nx,b\n", "line 2: column \"label\": \"b\""),
            (b"text,label\nx,a\n\xff,a\n", "line 3"),
        ];
        for (content, words) in cases {
            let error = read(content, Some(&known)).unwrap_err().to_string();
            assert!(error.contains("reviews.csv") && error.contains(words), "{error}");
        }
    }
}
