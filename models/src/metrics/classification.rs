//! How good a classifier is: the table of what was taken for what, and the figures that follow from it.

use kiln_tensor::{Error, Result};

/// How often each class was taken for each.
///
/// ```
/// use kiln_models::metrics::ConfusionMatrix;
/// let table = ConfusionMatrix::new(&[0, 0, 1, 1], &[0, 1, 1, 1], 2)?;
/// assert_eq!(table.counts(), [[1, 1], [0, 2]]);
/// assert_eq!(table.accuracy(), 0.75);
/// assert!((table.macro_f1() - (2.0 / 3.0 + 0.8) / 2.0).abs() < 1e-12);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfusionMatrix {
    counts: Vec<Vec<u64>>,
}

impl ConfusionMatrix {
    /// The table of the true `labels` and the `predictions`, among `classes` classes.
    ///
    /// # Errors
    /// If there are not as many of both, or one is not in 0..`classes`.
    pub fn new(labels: &[i64], predictions: &[i64], classes: usize) -> Result<Self> {
        if labels.len() != predictions.len() {
            let problem = format!("{} labels and {} predictions", labels.len(), predictions.len());
            return Err(Error::argument("confusion_matrix", problem));
        }
        let mut counts = vec![vec![0; classes]; classes];
        for (&label, &prediction) in labels.iter().zip(predictions) {
            let row = usize::try_from(label).ok().and_then(|label| counts.get_mut(label));
            let cell = row.and_then(|row| row.get_mut(usize::try_from(prediction).ok()?));
            let unknown = || Error::index("confusion_matrix", format!("class {label} taken for {prediction} among {classes} classes"));
            *cell.ok_or_else(unknown)? += 1;
        }
        Ok(Self { counts })
    }

    /// Counts: a row a true class, a column a predicted one.
    pub fn counts(&self) -> &[Vec<u64>] {
        &self.counts
    }

    fn total(&self) -> u64 {
        self.counts.iter().flatten().sum()
    }

    fn hits(&self, class: usize) -> u64 {
        self.counts.get(class).and_then(|row| row.get(class)).copied().unwrap_or(0)
    }

    /// How often `class` was the truth, and how often it was predicted.
    fn sums(&self, class: usize) -> (u64, u64) {
        let truth = self.counts.get(class).map_or(0, |row| row.iter().sum());
        (truth, self.counts.iter().filter_map(|row| row.get(class)).sum())
    }

    /// The share that was named correctly; NaN of nothing.
    pub fn accuracy(&self) -> f64 {
        (0..self.counts.len()).map(|class| self.hits(class)).sum::<u64>() as f64 / self.total() as f64
    }

    /// F₁ of a class, 2 · hits / (true + predicted): the harmonic mean of precision and recall. NaN if it is neither the truth nor predicted.
    pub fn f1(&self, class: usize) -> f64 {
        let (truth, predicted) = self.sums(class);
        2.0 * self.hits(class) as f64 / (truth + predicted) as f64
    }

    /// The mean of F₁ over the classes that occur (scikit-learn's `f1_score(average="macro")`).
    pub fn macro_f1(&self) -> f64 {
        let scores: Vec<f64> = (0..self.counts.len()).map(|class| self.f1(class)).filter(|f1| !f1.is_nan()).collect();
        scores.iter().sum::<f64>() / scores.len() as f64
    }

    /// The table as text, with the classes' `names`: a row a true class, with its recall at the end.
    pub fn table(&self, names: &[String]) -> String {
        let name = |class: usize| -> String { names.get(class).map_or_else(|| class.to_string(), |name| name.chars().take(20).collect()) };
        let names: Vec<String> = (0..self.counts.len()).map(name).collect();
        let first = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max("true \\ predicted".len());
        let mut text = format!("{:first$}", "true \\ predicted");
        names.iter().for_each(|name| text += &format!("  {name:>7}"));
        text += "   recall\n";
        for (class, (name, row)) in names.iter().zip(&self.counts).enumerate() {
            text += &format!("{name:first$}");
            for (column, count) in names.iter().zip(row) {
                text += &format!("  {count:>width$}", width = column.chars().count().max(7));
            }
            let recall = 100.0 * self.hits(class) as f64 / self.sums(class).0 as f64;
            text += &format!("  {:>5.1} %\n", recall);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the formula of scikit-learn's `f1_score`: 4/7, 4/5, 1/2; the last class never occurs.
    #[test]
    fn scores_are_scikit_learns() {
        let (labels, predictions) = ([0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 0, 0, 2]);
        let table = ConfusionMatrix::new(&labels, &predictions, 4).unwrap();
        for (class, expected) in [4.0 / 7.0, 0.8, 0.5].into_iter().enumerate() {
            assert!((table.f1(class) - expected).abs() < 1e-12, "{class}: {}", table.f1(class));
        }
        assert!(table.f1(3).is_nan() && table.f1(9).is_nan());
        assert!((table.macro_f1() - (4.0 / 7.0 + 0.8 + 0.5) / 3.0).abs() < 1e-12 && table.accuracy() == 0.625);
        let text = table.table(&["a", "b", "long name"].map(str::to_owned));
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(text.lines().all(|line| line.chars().count() == text.lines().next().map_or(0, |first| first.chars().count())), "{text}");
    }

    #[test]
    fn classes_that_are_none_are_errors() {
        assert!(ConfusionMatrix::new(&[0], &[0, 1], 2).is_err());
        for (label, prediction) in [(2, 0), (0, 2), (-1, 0), (0, -1)] {
            assert!(ConfusionMatrix::new(&[label], &[prediction], 2).is_err());
        }
        assert!(ConfusionMatrix::new(&[], &[], 0).unwrap().accuracy().is_nan());
    }
}
