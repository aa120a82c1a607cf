//! Passes in parts against passes as a whole.

use kiln_autograd::no_grad;
use kiln_models::nn::Params;
use kiln_models::transformer::{CausalLm, Gpt2Config, KvCache, Pass};
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
