//! Folders, configurations and prompts that are not what they should be: an error that names the key or the field.

use kiln_models::nn::Params;
use kiln_models::transformer::Gpt2Config;
use kiln_tensor::Result;

#[test]
fn a_config_that_claims_a_giant_is_an_error_before_memory() -> Result<()> {
    let params = Params::new();
    let config = Gpt2Config { n_embd: 1 << 20, n_head: 16, n_layer: 1 << 40, vocab_size: 1 << 30, ..Gpt2Config::default() };
    let error = params.build_from(Default::default(), kiln_models::nn::LoadMode::Strict, |p| config.build(p)).err().map(|e| e.to_string());
    assert!(error.is_some_and(|e| e.contains("transformer.wte.weight")));
    Ok(())
}
