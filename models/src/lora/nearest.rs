//! The names that are most like a wrong one.

/// At most `count` of `names`, the likest first.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>, count: usize) -> Vec<&'a str> {
    let mut all: Vec<(usize, &str)> = names.map(|other| (distance(name, other), other)).collect();
    all.sort();
    all.into_iter().take(count).map(|(_, name)| name).collect()
}

/// Number of bytes to insert, delete or replace (Levenshtein's distance).
fn distance(a: &str, b: &str) -> usize {
    // A file's names can be of any length; those of modules are short.
    let (a, b) = (a.get(..256).unwrap_or(a), b.get(..256).unwrap_or(b));
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().take(512).enumerate() {
        let mut left = i + 1;
        let mut corner = i;
        for (cell, y) in row.iter_mut().skip(1).zip(b.bytes()) {
            let best = (corner + usize::from(x != y)).min(*cell + 1).min(left + 1);
            corner = *cell;
            *cell = best;
            left = best;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_edits() {
        for (a, b, expected) in [("", "", 0), ("kitten", "sitting", 3), ("abc", "", 3), ("", "ab", 2), ("flaw", "lawn", 2)] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
        assert_eq!(nearest("to_w", ["to_k", "conv", "to_wq"].into_iter(), 2), ["to_k", "to_wq"]);
    }
}
