//! Tables of numbers from CSV files, with at most one column of class labels.

use super::error;
use kiln_tensor::{Error, Result};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Which column holds the class labels.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Label {
    /// None does.
    #[default]
    None,
    /// The column of this name; needs a header.
    Name(String),
    /// The column of this number, counted from 0.
    Index(usize),
    /// The last column.
    Last,
}

/// How a CSV file is to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsvOptions {
    /// Whether the first line holds the columns' names.
    pub header: bool,
    /// The byte between fields.
    pub delimiter: u8,
    /// The label column.
    pub label: Label,
}

impl Default for CsvOptions {
    /// A header, commas, no labels.
    fn default() -> Self {
        Self { header: true, delimiter: b',', label: Label::None }
    }
}

/// A table read from a CSV file.
#[derive(Clone, Debug, PartialEq)]
pub struct CsvTable {
    /// The names of the feature columns; their numbers as text if there is no header.
    pub columns: Vec<String>,
    /// The features, (rows, columns), row-major.
    pub features: Vec<f32>,
    /// A row's class: the index into `classes`. Empty without a label column.
    pub labels: Vec<i64>,
    /// The distinct labels; in numerical order if all are numbers, else in that of the text.
    pub classes: Vec<String>,
    /// The number of rows.
    pub rows: usize,
}

/// Reads the table at `path`. Spaces around fields are dropped and empty lines skipped.
///
/// # Errors
/// If the file cannot be read, a row has another number of fields than the first, a feature is not a number, or the label
/// column does not exist; the error names the line.
pub fn read_csv(path: impl AsRef<Path>, options: &CsvOptions) -> Result<CsvTable> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| error::io("open", path, e))?;
    parse_csv(BufReader::new(file), path, options)
}

/// As [`read_csv`], from any reader; `name` stands for the path in errors.
fn parse_csv(input: impl Read, name: &Path, options: &CsvOptions) -> Result<CsvTable> {
    let mut builder = csv::ReaderBuilder::new();
    let builder = builder.has_headers(options.header).delimiter(options.delimiter).trim(csv::Trim::All);
    let mut reader = builder.from_reader(input);
    let header = if options.header {
        let names = reader.headers().map_err(|e| wrap(name, e))?;
        Some(names.iter().map(str::to_owned).collect::<Vec<_>>())
    } else {
        None
    };
    let mut table = CsvTable { columns: vec![], features: vec![], labels: vec![], classes: vec![], rows: 0 };
    let mut label = None;
    let mut texts = Vec::new();
    if let Some(header) = header {
        label = label_column(&options.label, Some(&header), header.len(), name)?;
        table.columns = header;
    }
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(|e| wrap(name, e))? {
        let line = record.position().map_or(0, csv::Position::line);
        if table.rows == 0 && table.columns.is_empty() {
            label = label_column(&options.label, None, record.len(), name)?;
            table.columns = (0..record.len()).map(|i| i.to_string()).collect();
        }
        for (i, field) in record.iter().enumerate() {
            if Some(i) == label {
                texts.push(field.to_owned());
            } else {
                table.features.push(number(field, &table.columns[i], name, line)?);
            }
        }
        table.rows += 1;
    }
    if let Some(label) = label {
        table.columns.remove(label);
        (table.classes, table.labels) = classes(&texts);
    }
    Ok(table)
}

/// The label column's number.
fn label_column(label: &Label, header: Option<&[String]>, fields: usize, path: &Path) -> Result<Option<usize>> {
    let found = match label {
        Label::None => return Ok(None),
        Label::Last => fields.checked_sub(1),
        Label::Index(index) => Some(*index).filter(|&index| index < fields),
        Label::Name(name) => header.and_then(|names| names.iter().position(|other| other == name)),
    };
    let missing = || error::format(path, "label column", format!("there is no {label:?} among {fields} columns {header:?}"));
    found.map(Some).ok_or_else(missing)
}

fn number(field: &str, column: &str, path: &Path, line: u64) -> Result<f32> {
    let wrong = |_| error::line(path, line, format!("column {column:?}: found {:?}, expected a number", shorten(field)));
    field.parse().map_err(wrong)
}

/// Enough of a field to recognise it by: a hostile one may be as long as the file.
fn shorten(field: &str) -> String {
    field.chars().take(40).collect()
}

/// The distinct labels in their order, and each row's index into them.
pub(super) fn classes(texts: &[String]) -> (Vec<String>, Vec<i64>) {
    let distinct: BTreeSet<&str> = texts.iter().map(String::as_str).collect();
    let mut classes: Vec<&str> = distinct.into_iter().collect();
    if let Ok(numbers) = classes.iter().map(|c| c.parse::<f64>()).collect::<std::result::Result<Vec<_>, _>>() {
        let mut order: Vec<usize> = (0..classes.len()).collect();
        order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b]));
        classes = order.into_iter().map(|i| classes[i]).collect();
    }
    let place: std::collections::HashMap<&str, i64> = classes.iter().zip(0..).map(|(&class, i)| (class, i)).collect();
    let labels = texts.iter().map(|text| place[text.as_str()]).collect();
    (classes.into_iter().map(str::to_owned).collect(), labels)
}

/// A CSV error with the line it speaks of.
pub(super) fn wrap(path: &Path, error: csv::Error) -> Error {
    let line = error.position().map_or(0, csv::Position::line);
    match error.into_kind() {
        csv::ErrorKind::Io(source) => error::io("read", path, source),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            error::line(path, line, format!("found {len} fields, expected {expected_len}"))
        }
        csv::ErrorKind::Utf8 { err, .. } => error::line(path, line, err.to_string()),
        other => error::line(path, line, format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, options: CsvOptions) -> Result<CsvTable> {
        parse_csv(text.as_bytes(), Path::new("iris.csv"), &options)
    }

    #[test]
    fn reads_numbers_and_labels() {
        let label = Label::Name("kind".to_owned());
        let table = parse("a, kind ,b\n1,x,2.5\n\n-3e2, w,4\n5,x,6\n", CsvOptions { label, ..Default::default() }).unwrap();
        assert_eq!(table.columns, ["a", "b"]);
        assert_eq!(table.features, [1.0, 2.5, -300.0, 4.0, 5.0, 6.0]);
        assert_eq!((table.classes, table.labels, table.rows), (vec!["w".to_owned(), "x".to_owned()], vec![1, 0, 1], 3));
        let plain = CsvOptions { header: false, delimiter: b';', label: Label::Last };
        let table = parse("1;10\n2;9\n", plain).unwrap();
        assert_eq!((table.columns, table.classes, table.labels), (vec!["0".to_owned()], vec!["9".to_owned(), "10".to_owned()], vec![1, 0]));
    }

    #[test]
    fn errors_name_the_line() {
        let error = |text: &str| parse(text, CsvOptions::default()).unwrap_err().to_string();
        assert_eq!(error("a,b\n1,2\n3,four\n"), "read: iris.csv, line 3: column \"b\": found \"four\", expected a number");
        assert_eq!(error("a,b\n1,2\n3\n"), "read: iris.csv, line 3: found 1 fields, expected 2");
        let label = Label::Index(2);
        assert!(parse("a,b\n1,2\n", CsvOptions { label, ..Default::default() }).unwrap_err().to_string().contains("label column"));
        assert!(parse_csv(&b"a\n\xff\n"[..], Path::new("x"), &CsvOptions::default()).unwrap_err().to_string().contains("line 2"));
        assert_eq!(parse("", CsvOptions::default()).unwrap().rows, 0);
    }
}
