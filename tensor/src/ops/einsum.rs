//! Einstein summation, reduced to permutations, sums and batched matrix products.

use crate::{Error, Result, Shape, Tensor};

/// A dimension's name: a letter, or the i-th dimension (counted from the end) that an ellipsis stands for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Label {
    Ellipsis(usize),
    Letter(char),
}

/// One operand in the course of the work: a tensor and the names of its dimensions, each once.
struct Term {
    tensor: Tensor,
    labels: Vec<Label>,
}

fn error(equation: &str, message: impl std::fmt::Display) -> Error {
    Error::argument("einsum", format!("\"{equation}\": {message}"))
}

/// The labels of one operand's subscripts; `hidden` dimensions take the place of an ellipsis.
fn parse(equation: &str, subscripts: &str, hidden: usize) -> Result<Vec<Label>> {
    let mut labels = Vec::new();
    let mut rest = subscripts;
    let mut ellipsis = false;
    while let Some(c) = rest.chars().next() {
        if c.is_ascii_alphabetic() {
            labels.push(Label::Letter(c));
            rest = &rest[1..];
        } else if let Some(after) = rest.strip_prefix("...").filter(|_| !ellipsis) {
            labels.extend((0..hidden).rev().map(Label::Ellipsis));
            ellipsis = true;
            rest = after;
        } else {
            return Err(error(equation, format!("unexpected {c:?}; subscripts are letters and at most one \"...\" each")));
        }
    }
    Ok(labels)
}

impl Term {
    fn new(equation: &str, subscripts: &str, tensor: &Tensor) -> Result<Self> {
        let letters = subscripts.chars().filter(char::is_ascii_alphabetic).count();
        let mismatch = || error(equation, format!("subscripts \"{subscripts}\" do not fit shape {}", tensor.shape()));
        let hidden = tensor.rank().checked_sub(letters).ok_or_else(mismatch)?;
        let labels = parse(equation, subscripts, hidden)?;
        if labels.len() != tensor.rank() {
            return Err(mismatch());
        }
        let term = Self { tensor: tensor.clone(), labels };
        term.take_diagonals(equation)
    }

    /// Makes each label unique: dimensions with one name are walked together.
    fn take_diagonals(mut self, equation: &str) -> Result<Self> {
        while let Some((i, j)) = repeated(&self.labels) {
            if self.tensor.dims()[i] != self.tensor.dims()[j] {
                return Err(error(equation, format!("a repeated subscript names extents that differ in shape {}", self.tensor.shape())));
            }
            self.tensor = self.tensor.diagonal(0, i as isize, j as isize)?;
            let label = self.labels[i];
            self.labels.remove(j);
            self.labels.remove(i);
            self.labels.push(label);
        }
        Ok(self)
    }

    fn extent(&self, label: Label) -> Option<usize> {
        self.labels.iter().position(|&l| l == label).map(|d| self.tensor.dims()[d])
    }

    /// Sums the dimensions that `keep` refuses.
    fn sum_except(mut self, keep: impl Fn(Label) -> bool) -> Result<Self> {
        let gone: Vec<usize> = (0..self.labels.len()).filter(|&d| !keep(self.labels[d])).collect();
        if !gone.is_empty() {
            self.tensor = self.tensor.sum(gone)?;
            self.labels.retain(|&l| keep(l));
        }
        Ok(self)
    }

    /// The tensor with its dimensions in the order of `labels`, all of which it has.
    fn ordered(&self, labels: &[Label]) -> Result<Tensor> {
        let order: Vec<isize> = labels.iter().filter_map(|l| self.labels.iter().position(|x| x == l)).map(|d| d as isize).collect();
        self.tensor.permute(&order)
    }

    /// The tensor as a batch of matrices, whose batch, rows and columns are the given labels.
    fn matrices(&self, groups: [&[Label]; 3]) -> Result<Tensor> {
        let extents = groups.map(|g| g.iter().filter_map(|&l| self.extent(l)).product::<usize>());
        self.ordered(&groups.concat())?.reshape(extents)
    }

    /// The product of two terms, summed over what both have and `keep` refuses.
    fn contract(self, other: Self, keep: impl Fn(Label) -> bool) -> Result<Self> {
        let shared = |l: &Label| other.labels.contains(l);
        let (both, left): (Vec<Label>, Vec<Label>) = self.labels.iter().partition(|l| shared(l));
        let (batch, inner): (Vec<Label>, Vec<Label>) = both.iter().partition(|&&l| keep(l));
        let right: Vec<Label> = other.labels.iter().copied().filter(|l| !self.labels.contains(l)).collect();
        let (a, b) = (self.matrices([&batch, &left, &inner])?, other.matrices([&batch, &inner, &right])?);
        let labels = [batch, left, right].concat();
        let extents: Vec<usize> = labels.iter().filter_map(|&l| self.extent(l).or(other.extent(l))).collect();
        Ok(Self { tensor: a.matmul(&b)?.reshape(Shape::new(&extents)?)?, labels })
    }
}

fn repeated(labels: &[Label]) -> Option<(usize, usize)> {
    labels.iter().enumerate().find_map(|(i, l)| Some((i, i + 1 + labels[i + 1..].iter().position(|x| x == l)?)))
}

/// The labels of the result: as the equation says, or else the ellipsis and every letter that occurs once, in order.
fn output_labels(equation: &str, output: Option<&str>, terms: &[Term], inputs: &str) -> Result<Vec<Label>> {
    let all = || terms.iter().flat_map(|t| t.labels.iter().copied());
    let hidden = all().filter_map(|l| if let Label::Ellipsis(i) = l { Some(i + 1) } else { None }).max().unwrap_or(0);
    let Some(output) = output else {
        let mut letters: Vec<char> = inputs.chars().filter(|c| c.is_ascii_alphabetic() && inputs.matches(*c).count() == 1).collect();
        letters.sort_unstable();
        return Ok((0..hidden).rev().map(Label::Ellipsis).chain(letters.into_iter().map(Label::Letter)).collect());
    };
    let labels = parse(equation, output, hidden)?;
    if let Some((i, _)) = repeated(&labels) {
        return Err(error(equation, format!("the output names {:?} twice", labels[i])));
    }
    match labels.iter().find(|&&l| all().all(|x| x != l)) {
        Some(Label::Letter(c)) => Err(error(equation, format!("the output's {c:?} is in no operand"))),
        _ => Ok(labels),
    }
}

/// Repeats the extents of 1 where another operand has more under the same name.
fn broadcast(equation: &str, terms: &mut [Term]) -> Result<()> {
    let extents: Vec<(Label, usize)> = terms.iter().flat_map(|t| t.labels.iter().copied().zip(t.tensor.dims().iter().copied())).collect();
    for term in terms.iter_mut() {
        let mut shape = *term.tensor.shape();
        for (d, &label) in term.labels.iter().enumerate() {
            let wanted = extents.iter().filter(|(l, _)| *l == label).map(|&(_, n)| n).find(|&n| n != 1).unwrap_or(1);
            match shape[d] {
                n if n == wanted => {}
                1 => shape = shape.with_dim(d, wanted)?,
                n => return Err(error(equation, format!("one subscript names the extents {wanted} and {n}"))),
            }
        }
        term.tensor = term.tensor.expand(shape)?;
    }
    Ok(())
}

impl Tensor {
    /// Einstein summation: each operand's dimensions are named by letters, and the result is the sum, over all names that the
    /// output lacks, of the product of the operands. `"bij,bjk->bik"` is a batched matrix product, `"ii"` a trace.
    ///
    /// As in PyTorch: without `->` the output has the names that occur once, in alphabetical order; `...` stands for leading
    /// dimensions that broadcast; a name repeated in one operand takes the diagonal; extents of 1 broadcast. Operands are contracted
    /// from left to right.
    pub fn einsum(equation: &str, operands: &[&Tensor]) -> Result<Tensor> {
        let compact: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
        let (inputs, output) = match compact.split_once("->") {
            Some((inputs, output)) => (inputs, Some(output)),
            None => (compact.as_str(), None),
        };
        let subscripts: Vec<&str> = inputs.split(',').collect();
        if subscripts.len() != operands.len() || operands.is_empty() {
            return Err(error(equation, format!("{} operands are named, {} given", subscripts.len(), operands.len())));
        }
        let terms = subscripts.iter().zip(operands).map(|(s, t)| Term::new(equation, s, t));
        let mut terms = terms.collect::<Result<Vec<_>>>()?;
        let output = output_labels(equation, output, &terms, inputs)?;
        broadcast(equation, &mut terms)?;
        let mut rest = terms.into_iter();
        let mut result = rest.next().ok_or_else(|| error(equation, "no operands"))?;
        while let Some(next) = rest.next() {
            // What neither the output nor a later operand asks for is summed as soon as nothing else has it.
            let later = |l: Label| output.contains(&l) || rest.as_slice().iter().any(|t| t.labels.contains(&l));
            let (in_result, in_next) = (result.labels.clone(), next.labels.clone());
            result = result.sum_except(|l| later(l) || in_next.contains(&l))?;
            let next = next.sum_except(|l| later(l) || in_result.contains(&l))?;
            result = result.contract(next, later)?;
        }
        result.sum_except(|l| output.contains(&l))?.ordered(&output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn malformed_equations_are_errors() {
        let x = Tensor::zeros([2, 3], DType::F32).unwrap();
        for equation in ["", "i", "ijk", "ij,jk", "ij->ii", "ij->k", "i1", "i-j", "....", "...i...", "ij->->", "ii", "é"] {
            assert!(Tensor::einsum(equation, &[&x]).is_err(), "{equation:?}");
        }
        assert!(Tensor::einsum("ij,ij", &[]).is_err());
        let message = Tensor::einsum("ij,jk", &[&x, &x]).unwrap_err().to_string();
        assert_eq!(message, "einsum: \"ij,jk\": one subscript names the extents 3 and 2");
    }
}
