//! What can be told from a text's words alone, without their order: the least that a model of texts has to beat.

use kiln_tensor::{Error, Result};
use std::collections::HashMap;

/// Multinomial naive Bayes: P(class | text) ∝ P(class) · Π P(token | class), with each count one larger than it is (Laplace).
///
/// ```
/// use kiln_models::classifier::NaiveBayes;
/// let (texts, labels) = ([vec![5, 6], vec![7, 6], vec![5, 5, 6]], [0, 1, 0]);
/// let model = NaiveBayes::fit(&texts, &labels, 2)?;
/// assert_eq!([model.predict(&[5]), model.predict(&[6, 7])], [0, 1]);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct NaiveBayes {
    /// log P(class).
    priors: Vec<f64>,
    /// log P(token | class) of each class, of the tokens seen.
    tokens: HashMap<u32, Vec<f64>>,
}

impl NaiveBayes {
    /// Counts the tokens of `texts`, whose `labels` are numbers of `classes` classes.
    ///
    /// # Errors
    /// If there are not as many labels as texts, or one is not in 0..`classes`.
    pub fn fit(texts: &[Vec<u32>], labels: &[i64], classes: usize) -> Result<Self> {
        if texts.len() != labels.len() {
            return Err(Error::argument("naive_bayes", format!("{} texts have {} labels", texts.len(), labels.len())));
        }
        let mut members = vec![0u64; classes];
        let mut lengths = vec![0u64; classes];
        let mut counts: HashMap<u32, Vec<u64>> = HashMap::new();
        for (text, &label) in texts.iter().zip(labels) {
            let unknown = || Error::index("naive_bayes", format!("label {label} among {classes} classes"));
            let class = usize::try_from(label).ok().filter(|&class| class < classes).ok_or_else(unknown)?;
            members[class] += 1;
            lengths[class] += text.len() as u64;
            for &token in text {
                counts.entry(token).or_insert_with(|| vec![0; classes])[class] += 1;
            }
        }
        let vocabulary = counts.len() as f64;
        let log_share = |count: u64, class: usize| ((count as f64 + 1.0) / (lengths[class] as f64 + vocabulary)).ln();
        let of_token = |counts: Vec<u64>| counts.into_iter().enumerate().map(|(class, count)| log_share(count, class)).collect();
        Ok(Self {
            priors: members.iter().map(|&count| (count as f64 / texts.len() as f64).ln()).collect(),
            tokens: counts.into_iter().map(|(token, counts)| (token, of_token(counts))).collect(),
        })
    }

    /// The likeliest class of a text, the first if several are; tokens that were never seen tell nothing.
    pub fn predict(&self, text: &[u32]) -> i64 {
        let mut scores = self.priors.clone();
        for shares in text.iter().filter_map(|token| self.tokens.get(token)) {
            scores.iter_mut().zip(shares).for_each(|(score, share)| *score += share);
        }
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (0..).zip(&scores).find(|(_, score)| **score == best).map_or(0, |(class, _)| class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_formula() {
        let model = NaiveBayes::fit(&[vec![1, 2], vec![1], vec![3]], &[0, 0, 1], 2).unwrap();
        assert!((model.priors[0] - (2.0f64 / 3.0).ln()).abs() < 1e-12);
        // Three tokens in class 0, one in class 1, three in the vocabulary.
        assert!((model.tokens[&1][0] - (3.0f64 / 6.0).ln()).abs() < 1e-12);
        assert!((model.tokens[&1][1] - (1.0f64 / 4.0).ln()).abs() < 1e-12);
        assert_eq!([model.predict(&[3]), model.predict(&[1, 3, 3]), model.predict(&[9]), model.predict(&[])], [1, 1, 0, 0]);
    }

    #[test]
    fn labels_that_are_none_are_errors() {
        assert!(NaiveBayes::fit(&[vec![1]], &[], 2).is_err());
        assert!(NaiveBayes::fit(&[vec![1]], &[2], 2).is_err() && NaiveBayes::fit(&[vec![1]], &[-1], 2).is_err());
        assert_eq!(NaiveBayes::fit(&[], &[], 0).unwrap().predict(&[1]), 0);
        // A class without texts is never chosen.
        assert_eq!(NaiveBayes::fit(&[vec![1]], &[1], 3).unwrap().predict(&[7]), 1);
    }
}
