//! Matrix products.

use crate::harness::{Case, DTypes, case};
use crate::reference::{Array, indices};
use kiln_kernels::cpu::math::double;
use kiln_tensor::{Activation, Tensor};

/// `[.., m, k]` times `[.., k, n]`, broadcasting the leading dimensions.
fn matmul(a: &Array, b: &Array) -> Array {
    let (a_lead, b_lead) = (a.shape.len() - 2, b.shape.len() - 2);
    let (k, n) = (b.shape[b_lead], b.shape[b_lead + 1]);
    let lead = Array::new(&a.shape[..a_lead], vec![0.0; a.shape[..a_lead].iter().product()])
        .zip(&Array::new(&b.shape[..b_lead], vec![0.0; b.shape[..b_lead].iter().product()]), |_, _| 0.0)
        .shape;
    Array::from_fn(&[&lead[..], &[a.shape[a_lead], n]].concat(), |i| {
        let (lead, at) = i.split_at(i.len() - 2);
        (0..k).map(|p| a.at_broadcast(&[lead, &[at[0], p]].concat()) * b.at_broadcast(&[lead, &[p, at[1]]].concat())).sum()
    })
}

pub(super) fn linear(x: &[Array]) -> Array {
    let k = x[1].shape[1];
    let rows = x[0].data.len().checked_div(k).unwrap_or(0);
    let y = matmul(&x[0].reshape(&[rows, k]), &x[1].permute(&[1, 0]));
    let y = if x.len() > 2 { y.zip(&x[2], |y, b| y + b) } else { y };
    y.reshape(&[&x[0].shape[..x[0].shape.len() - 1], &[x[1].shape[0]]].concat())
}

/// The sum over every assignment of the letters, straight from the definition; subscripts as in `"ij,jk->ik"`.
fn einsum(equation: &str, x: &[Array]) -> Array {
    let (inputs, output) = equation.split_once("->").unwrap();
    let subscripts: Vec<&str> = inputs.split(',').collect();
    let mut letters: Vec<char> = inputs.chars().filter(|c| c.is_alphabetic()).collect();
    letters.sort_unstable();
    letters.dedup();
    let named =
        |c: char| subscripts.iter().zip(x).flat_map(move |(s, x)| s.chars().zip(&x.shape).filter(move |(l, _)| *l == c).map(|(_, &n)| n));
    let extents: Vec<usize> = letters.iter().map(|&c| named(c).find(|&n| n != 1).unwrap_or(1)).collect();
    let place = |c: char| letters.iter().position(|&l| l == c).unwrap();
    let shape: Vec<usize> = output.chars().map(|c| extents[place(c)]).collect();
    Array::from_fn(&shape, |out| {
        let agrees = |i: &Vec<usize>| output.chars().zip(out).all(|(c, &o)| i[place(c)] == o);
        let value = |i: &Vec<usize>| -> f64 {
            let factor = |(s, x): (&&str, &Array)| x.at_broadcast(&s.chars().map(|c| i[place(c)]).collect::<Vec<_>>());
            subscripts.iter().zip(x).map(factor).product()
        };
        indices(&extents).filter(agrees).map(|i| value(&i)).sum()
    })
}

/// A case of the equation; `plain` is the same with its output and ellipses spelt out.
fn equation(equation: &'static str, plain: &'static str, shapes: &[&[usize]]) -> Case {
    let f = move |x: &[Tensor]| Tensor::einsum(equation, &x.iter().collect::<Vec<_>>());
    case("einsum", f, move |x| einsum(plain, x)).label(equation).sample(shapes)
}

fn einsum_cases() -> Vec<Case> {
    vec![
        equation("ij,jk->ik", "ij,jk->ik", &[&[2, 3], &[3, 4]]).dtypes(DTypes::Numbers),
        equation("ij, jk", "ij,jk->ik", &[&[2, 3], &[3, 4]]),
        equation("ba", "ba->ab", &[&[2, 3]]),
        equation("ij->", "ij->", &[&[2, 3]]),
        equation("bij,bjk->bki", "bij,bjk->bki", &[&[2, 2, 3], &[2, 3, 2]]),
        equation("bhqd,bhkd->bhqk", "bhqd,bhkd->bhqk", &[&[2, 2, 2, 3], &[2, 2, 2, 3]]),
        equation("ii->i", "ii->i", &[&[3, 3]]),
        equation("iij,jk->ik", "iij,jk->ik", &[&[2, 2, 3], &[3, 2]]),
        equation("i,j->ij", "i,j->ij", &[&[2], &[3]]),
        equation("i,i->", "i,i->", &[&[3], &[3]]),
        equation("ij,ij->ij", "ij,ij->ij", &[&[2, 3], &[2, 3]]),
        equation("ij,k->i", "ij,k->i", &[&[2, 3], &[2]]),
        equation("...ij,...jk->...ik", "abij,bjk->abik", &[&[2, 1, 2, 3], &[2, 3, 2]]),
        equation("i...->...", "iab->ab", &[&[2, 3, 2]]),
        equation("ij,ij", "ij,ij->", &[&[2, 3], &[1, 3]]),
        equation("ij,jk,kl->il", "ij,jk,kl->il", &[&[2, 3], &[3, 2], &[2, 2]]),
        equation("bi,io,bo->b", "bi,io,bo->b", &[&[2, 3], &[3, 2], &[2, 2]]),
    ]
}

fn linear_activation(label: &'static str, activation: Activation, reference: fn(f64) -> f64) -> Case {
    case("linear_activation", move |x| x[0].linear_activation(&x[1], x.get(2), activation), move |x| linear(x).map(reference))
        .label(label)
        .sample(&[&[2, 3], &[4, 3], &[4]])
        .sample(&[&[2, 1, 3], &[2, 3], &[2]])
        .sample(&[&[2, 3], &[4, 3]])
        .sample(&[&[0, 3], &[4, 3], &[4]])
        .sample(&[&[3, 70], &[5, 70], &[5]])
        .large(&[&[64, 784], &[512, 784], &[512]])
}

pub fn cases() -> Vec<Case> {
    let column = |v: &Array| v.reshape(&[v.shape[0], 1]);
    let row = |v: &Array| v.reshape(&[1, v.shape[0]]);
    let mut cases = vec![
        case("matmul", |x| x[0].matmul(&x[1]), |x| matmul(&x[0], &x[1]))
            .dtypes(DTypes::Numbers)
            .sample(&[&[2, 3], &[3, 4]])
            .sample(&[&[1, 5], &[5, 1]])
            .sample(&[&[0, 3], &[3, 2]])
            .sample(&[&[2, 2, 3], &[2, 3, 2]])
            .sample(&[&[2, 2, 3], &[3, 2]])
            .sample(&[&[2, 1, 2, 3], &[3, 3, 1]])
            .sample(&[&[1, 2, 2], &[3, 2, 2]])
            .large(&[&[3, 200, 300], &[300, 150]]),
        case("matmul", |x| x[0].matmul(&x[1]), |x| matmul(&x[0], &x[1]))
            .label("larger than a tile")
            .sample(&[&[14, 35], &[35, 33]])
            .large(&[&[2, 300, 256], &[2, 256, 270]]),
        case("matmul", |x| x[0].matmul(&x[1]), move |x| matmul(&x[0], &column(&x[1])).fold(&[x[0].shape.len() - 1], |v| v[0]))
            .label("by a vector")
            .also(&["mv"])
            .sample(&[&[2, 3], &[3]])
            .sample(&[&[2, 2, 3], &[3]])
            .large(&[&[3000, 700], &[700]]),
        case("matmul", |x| x[0].matmul(&x[1]), move |x| matmul(&row(&x[0]), &x[1]).fold(&[x[1].shape.len() - 2], |v| v[0]))
            .label("of a vector")
            .sample(&[&[3], &[3, 2]])
            .sample(&[&[3], &[2, 3, 2]])
            .large(&[&[700], &[700, 3000]]),
        case("mv", |x| x[0].mv(&x[1]), move |x| matmul(&x[0], &column(&x[1])).fold(&[1], |v| v[0])).sample(&[&[2, 3], &[3]]),
        case("bmm", |x| x[0].bmm(&x[1]), |x| matmul(&x[0], &x[1])).sample(&[&[2, 2, 3], &[2, 3, 4]]).large(&[&[9, 70, 64], &[9, 64, 70]]),
        case("dot", |x| x[0].dot(&x[1]), |x| Array::scalar(x[0].zip(&x[1], |a, b| a * b).sum()))
            .dtypes(DTypes::Numbers)
            .sample(&[&[5], &[5]])
            .sample(&[&[0], &[0]]),
        case("outer", |x| x[0].outer(&x[1]), move |x| column(&x[0]).zip(&x[1], |a, b| a * b)).dtypes(DTypes::Numbers).sample(&[&[2], &[3]]),
        case("linear", |x| x[0].linear(&x[1], x.get(2)), linear)
            .dtypes(DTypes::Numbers)
            .sample(&[&[2, 3], &[4, 3], &[4]])
            .sample(&[&[2, 1, 3], &[2, 3], &[2]])
            .sample(&[&[3], &[2, 3], &[2]])
            .sample(&[&[2, 3], &[4, 3]])
            .sample(&[&[0, 3], &[4, 3], &[4]])
            .large(&[&[64, 784], &[512, 784], &[512]]),
    ];
    cases.extend([
        linear_activation("relu", Activation::Relu, |x| x.max(0.0)),
        linear_activation("leaky_relu", Activation::LeakyRelu(0.2), |x| if x > 0.0 { x } else { 0.2 * x }),
        linear_activation("gelu", Activation::Gelu, |x| x * double::normal_cdf(x)),
        linear_activation("gelu_tanh", Activation::GeluTanh, super::pointwise::gelu_tanh),
        linear_activation("silu", Activation::Silu, |x| x * double::sigmoid(x)),
    ]);
    cases.extend(einsum_cases());
    cases
}
