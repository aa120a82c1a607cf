//! What is done with embeddings: similarity, retrieval, zero-shot classes.

use kiln_tensor::{DType, Error, Result, Tensor};

/// Embeddings (…, P) scaled to length 1.
///
/// # Errors
/// If they are no floats.
pub fn normalize(embeds: &Tensor) -> Result<Tensor> {
    // A vector of zeros stays one.
    embeds.div(&embeds.norm_keepdim(2.0, -1)?.clamp(1e-12, None)?)
}

/// The cosines of the angles between embeddings `a` (N, P) and `b` (M, P): (N, M).
///
/// # Errors
/// If the widths differ.
pub fn similarity(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ([_, p], [_, q]) = (a.dims_n("similarity")?, b.dims_n("similarity")?);
    if p != q {
        return Err(Error::shape("similarity", format!("embeddings {} and {} differ in width", a.shape(), b.shape())));
    }
    normalize(a)?.matmul(&normalize(b)?.t()?)
}

/// The embeddings of K classes, (K, P), each the mean direction of those of its `templates` texts: `text_embeds` (K · templates, P)
/// holds all texts of the first class, then those of the second, ….
///
/// Source: Radford et al. 2021, section 3.1.4.
///
/// # Errors
/// If `templates` does not divide the texts.
pub fn zero_shot_classes(text_embeds: &Tensor, templates: usize) -> Result<Tensor> {
    let [texts, width] = text_embeds.dims_n("zero_shot_classes")?;
    if templates == 0 || texts == 0 || !texts.is_multiple_of(templates) {
        return Err(Error::argument("zero_shot_classes", format!("{texts} texts are not {templates} for each class")));
    }
    normalize(&normalize(text_embeds)?.reshape([texts / templates, templates, width])?.mean(1)?)
}

/// The share of rows of `similarity` (N, M) of whose `k` largest columns one at least belongs to the row, as `belongs(row, column)` says.
/// Of equal columns the first counts as larger.
///
/// # Errors
/// If `k` is 0, or more than there are columns, or there are no rows.
pub fn recall_at(similarity: &Tensor, k: usize, belongs: impl Fn(usize, usize) -> bool) -> Result<f64> {
    let [rows, columns] = similarity.dims_n("recall_at")?;
    if k == 0 || k > columns || rows == 0 {
        return Err(Error::argument("recall_at", format!("the best {k} of similarities {}", similarity.shape())));
    }
    let (_, best) = similarity.detach().to_dtype(DType::F32)?.topk(k, 1, true)?;
    let best: Vec<i64> = best.to_vec()?;
    let hits = best.chunks_exact(k).enumerate().filter(|(row, best)| best.iter().any(|&column| belongs(*row, column as usize)));
    Ok(hits.count() as f64 / rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recall_counts_rows_with_a_match_among_the_best() -> Result<()> {
        let similarity = Tensor::from_vec(vec![0.9f32, 0.1, 0.5, 0.2, 0.8, 0.3, 0.7, 0.6, 0.5], [3, 3])?;
        assert_eq!(recall_at(&similarity, 1, |row, column| row == column)?, 2.0 / 3.0);
        assert_eq!(recall_at(&similarity, 2, |row, column| row == column)?, 2.0 / 3.0);
        assert_eq!(recall_at(&similarity, 3, |row, column| row == column)?, 1.0);
        // Two columns may belong to a row.
        assert_eq!(recall_at(&similarity, 1, |row, column| row == column || (row, column) == (2, 0))?, 1.0);
        assert!(recall_at(&similarity, 4, |_, _| true).is_err() && recall_at(&similarity, 0, |_, _| true).is_err());
        Ok(())
    }

    #[test]
    fn classes_are_mean_directions() -> Result<()> {
        let texts = Tensor::from_vec(vec![3f32, 0.0, 0.0, 2.0, -1.0, 0.0, -5.0, 0.0], [4, 2])?;
        let classes = zero_shot_classes(&texts, 2)?.to_vec::<f32>()?;
        let half = 0.5f32.sqrt();
        assert!(classes.iter().zip([half, half, -1.0, 0.0]).all(|(a, b)| (a - b).abs() < 1e-6), "{classes:?}");
        assert!(zero_shot_classes(&texts, 3).is_err() && similarity(&texts, &Tensor::zeros([1, 3], ())?).is_err());
        assert_eq!(normalize(&Tensor::zeros([1, 2], ())?)?.to_vec::<f32>()?, [0.0, 0.0]);
        Ok(())
    }
}
