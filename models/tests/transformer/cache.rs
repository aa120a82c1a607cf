//! Passes in parts against passes as a whole, and packed sequences against sequences apart.

use crate::{expect_close, folder};
use kiln_autograd::{TensorExt, no_grad};
use kiln_models::nn::Params;
use kiln_models::transformer::{CausalLm, Gpt2Config, KvCache, Pass, load};
use kiln_tensor::{Result, Tensor};

#[test]
fn a_cached_pass_continues_the_sequence() -> Result<()> {
    let params = Params::seeded(1);
    let config = Gpt2Config { vocab_size: 20, n_positions: 16, n_embd: 16, n_layer: 2, n_head: 2, ..Gpt2Config::default() };
    let model = config.build(&params)?;
    params.eval();
    let tokens = Tensor::randint(0, 20, [2, 9])?;
    no_grad(|| {
        let whole = model.forward(&tokens, Pass::default())?;
        let mut cache = KvCache::new(model.shape(), 2, 9, ())?;
        let mut parts = Vec::new();
        for (start, len) in [(0, 4), (4, 1), (5, 3), (8, 1)] {
            parts.push(model.forward(&tokens.narrow(1, start, len)?, Pass::cached(&mut cache))?);
        }
        let difference = Tensor::cat(&parts, 1)?.sub(&whole)?.abs()?.max(())?.item_f64()?;
        assert!(difference < 1e-5, "{difference}");
        assert!(model.forward(&tokens.narrow(1, 0, 1)?, Pass::cached(&mut cache)).is_err());
        Ok(())
    })
}

/// Three sequences packed into one row: logits and gradients are those of the sequences by themselves.
#[test]
fn packed_sequences_do_not_meet() -> Result<()> {
    const LENGTHS: [usize; 3] = [4, 1, 3];
    for name in ["gpt2", "llama", "mistral", "opt"] {
        let params = Params::new();
        let (_, model) = load(folder(name), &params)?;
        params.eval();
        let tokens = Tensor::randint(0, 40, [1, 8])?;
        let weight = Tensor::randn([1, 8, 40], ())?; // A loss that no place is left out of.
        let segments = Tensor::from_vec(vec![5i64, 5, 5, 5, 2, 7, 7, 7], [1, 8])?;
        let grads = |logits: &Tensor| -> Result<Vec<Tensor>> {
            params.zero_grad();
            logits.mul(&weight)?.sum(())?.backward()?;
            Ok(params.params().iter().filter_map(|p| p.grad()).collect())
        };
        let packed = model.forward(&tokens, Pass { segments: Some(&segments), ..Pass::default() })?;
        let of_packed = grads(&packed)?;
        let mut start = 0;
        let apart = LENGTHS.map(|len| {
            start += len;
            model.forward(&tokens.narrow(1, start - len, len)?, Pass::default())
        });
        let apart = Tensor::cat(&apart.into_iter().collect::<Result<Vec<_>>>()?, 1)?;
        expect_close(name, &packed, &apart)?;
        let of_apart = grads(&apart)?;
        assert_eq!(of_packed.len(), of_apart.len());
        let most = of_apart.iter().map(|grad| grad.abs()?.max(())?.item_f64()).collect::<Result<Vec<_>>>()?.into_iter().fold(0.0, f64::max);
        for (a, b) in of_packed.iter().zip(&of_apart) {
            let difference = a.sub(b)?.abs()?.max(())?.item_f64()?;
            assert!(difference <= 1e-6 * most, "{name}: {difference}");
        }
    }
    Ok(())
}
