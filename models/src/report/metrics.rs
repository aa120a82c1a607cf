//! A table of numbers that grows by a row a step.

use kiln_tensor::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// `metrics.csv`: a header, and a row of numbers for each call of [`write`](MetricsCsv::write). Rows are kept in memory too, for plots.
pub struct MetricsCsv {
    path: PathBuf,
    columns: Vec<String>,
    rows: Vec<Vec<f64>>,
    file: Option<BufWriter<File>>,
}

impl MetricsCsv {
    /// A table for the file `path`, which is written anew at the first row; until then [`restore`](MetricsCsv::restore) can
    /// take up the rows of an earlier run.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn create(path: &Path, columns: &[&str]) -> Result<Self> {
        super::make_parent("metrics", path)?;
        Ok(Self { path: path.to_owned(), columns: columns.iter().map(|c| c.to_string()).collect(), rows: Vec::new(), file: None })
    }

    fn io(&self, e: std::io::Error) -> Error {
        Error::io("metrics", self.path.display(), e)
    }

    /// Takes up those rows of the file that `keep` wants: the ones up to the checkpoint that a run continues from.
    ///
    /// # Errors
    /// If the file is not a table with these columns. A file that does not exist has no rows.
    pub fn restore(&mut self, keep: impl Fn(&[f64]) -> bool) -> Result<()> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(self.io(e)),
        };
        let mut lines = text.lines();
        if lines.next() != Some(self.columns.join(",").as_str()) {
            return Err(Error::format("metrics", format!("{} has other columns than {}", self.path.display(), self.columns.join(","))));
        }
        for line in lines {
            let row: Vec<f64> = line.split(',').filter_map(|cell| cell.parse().ok()).collect();
            // A run that was killed may have left half of a row.
            if row.len() == self.columns.len() && keep(&row) {
                self.rows.push(row);
            }
        }
        Ok(())
    }

    /// Adds a row.
    ///
    /// # Errors
    /// If it has not as many numbers as there are columns, or the file cannot be written.
    pub fn write(&mut self, row: &[f64]) -> Result<()> {
        if row.len() != self.columns.len() {
            return Err(Error::argument("metrics", format!("{} numbers for the columns {}", row.len(), self.columns.join(","))));
        }
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.start()?,
        };
        let result = writeln!(file, "{}", join(row));
        self.file = Some(file);
        self.rows.push(row.to_vec());
        result.map_err(|e| self.io(e))
    }

    /// Opens the file and writes the header and what was restored.
    fn start(&self) -> Result<BufWriter<File>> {
        let mut file = BufWriter::new(File::create(&self.path).map_err(|e| self.io(e))?);
        let mut text = self.columns.join(",") + "\n";
        for row in &self.rows {
            text += &(join(row) + "\n");
        }
        file.write_all(text.as_bytes()).map_err(|e| self.io(e))?;
        Ok(file)
    }

    /// Hands everything to the operating system.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        match &mut self.file {
            Some(file) => file.flush().map_err(|e| Error::io("metrics", self.path.display(), e)),
            None => Ok(()),
        }
    }

    /// The values of a column so far; none if there is no such column.
    pub fn column(&self, name: &str) -> Vec<f64> {
        let at = self.columns.iter().position(|c| c == name);
        at.map(|at| self.rows.iter().map(|row| row[at]).collect()).unwrap_or_default()
    }
}

fn join(row: &[f64]) -> String {
    row.iter().map(f64::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_table_goes_on_where_the_checkpoint_was() -> Result<()> {
        let path = std::env::temp_dir().join(format!("kiln-metrics-{}", std::process::id())).join("metrics.csv");
        let mut table = MetricsCsv::create(&path, &["step", "loss"])?;
        for step in 1..=5 {
            table.write(&[step as f64, 1.0 / step as f64])?;
        }
        assert!(table.write(&[1.0]).is_err());
        table.flush()?;
        drop(table);
        let mut table = MetricsCsv::create(&path, &["step", "loss"])?;
        table.restore(|row| row[0] <= 3.0)?;
        table.write(&[4.0, 0.25])?;
        table.flush()?;
        assert_eq!(table.column("step"), [1., 2., 3., 4.]);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 5);
        assert!(MetricsCsv::create(&path, &["other"])?.restore(|_| true).is_err());
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
        Ok(())
    }
}
