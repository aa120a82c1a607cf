//! Texts with a class each, from CSV files.

use crate::data::csv::{classes, wrap};
use crate::data::error;
use crate::data::rng::Rng;
use kiln_tensor::{Error, Result};
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

impl TextClassification {
    /// The texts to train on, and `share` of them (0 to 1, exclusive) to measure with. Each class is divided by itself, so that both parts have
    /// the same shares of them; a class of few texts is to train on. Which text goes where follows from `seed` and the order of the file.
    ///
    /// # Errors
    /// If `share` is out of its domain, or so small that nothing is left to measure with.
    pub fn split(self, share: f64, seed: u64) -> Result<(Self, Self)> {
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::argument("split", format!("a share of {share} to measure with is not between 0 and 1")));
        }
        let mut held_out = vec![false; self.labels.len()];
        for class in 0..self.classes.len() {
            let of_class = self.labels.iter().enumerate().filter(|(_, label)| **label == class as i64);
            let mut members: Vec<usize> = of_class.map(|(i, _)| i).collect();
            Rng::keyed(seed, class as u64, 0).shuffle(&mut members);
            let count = (share * members.len() as f64) as usize;
            members.iter().take(count).for_each(|&i| held_out[i] = true);
        }
        if !held_out.contains(&true) {
            let problem = format!("a share of {share} of {} texts in {} classes is none", self.texts.len(), self.classes.len());
            return Err(Error::argument("split", format!("{problem}; take a larger one, or give more texts")));
        }
        let [mut train, mut test] = [const { (Vec::new(), Vec::new()) }; 2];
        for ((text, label), is_held_out) in self.texts.into_iter().zip(self.labels).zip(held_out) {
            let part = if is_held_out { &mut test } else { &mut train };
            part.0.push(text);
            part.1.push(label);
        }
        let part = |(texts, labels)| Self { texts, labels, classes: self.classes.clone() };
        Ok((part(train), part(test)))
    }
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
    fn each_class_is_divided_by_itself() {
        let labels: Vec<i64> = (0..101).map(|i| if i == 100 { 2 } else { i64::from(i % 4 == 0) }).collect();
        let classes = ["a", "b", "c"].map(str::to_owned).to_vec();
        let all = TextClassification { texts: (0..101).map(|i| i.to_string()).collect(), labels, classes };
        let (train, test) = all.clone().split(0.2, 7).unwrap();
        let counts = |part: &TextClassification| [0, 1, 2].map(|class| part.labels.iter().filter(|&&label| label == class).count());
        assert_eq!((counts(&train), counts(&test)), ([60, 20, 1], [15, 5, 0]));
        let mut texts = [train.texts.clone(), test.texts.clone()].concat();
        texts.sort_by_key(|text| text.parse::<usize>().unwrap());
        assert_eq!(texts, all.texts);
        assert_eq!(all.clone().split(0.2, 7).unwrap(), (train, test.clone()));
        assert_ne!(all.clone().split(0.2, 8).unwrap().1, test);
        for share in [0.0, 1.0, -1.0, f64::NAN, 1e-3] {
            assert!(all.clone().split(share, 0).is_err());
        }
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
