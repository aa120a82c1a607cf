//! Linear layers whose weights are kept in few bits: how they become so, and their place in a state dictionary.

use super::linear::Weight;
use super::{Linear, Param, Params};
use kiln_tensor::{DType, Error, Quantization, QuantizedMatrix, Result, Tensor};

/// The weight of a quantised layer as an entry of a state dictionary.
#[derive(Clone)]
pub(super) struct QuantizedWeight {
    /// The name that the parameter had.
    pub name: String,
    pub layer: Linear,
    matrix: QuantizedMatrix,
}

impl QuantizedWeight {
    /// `None` for a layer with a dense weight.
    pub fn of(layer: &Linear) -> Option<Self> {
        Some(Self { name: weight_name(layer), layer: layer.clone(), matrix: layer.quantized()? })
    }

    pub fn saved(&self) -> Result<Tensor> {
        self.matrix.to_tensor()
    }

    /// The matrix that `tensor` holds, if it is one for this layer.
    pub fn restored(&self, tensor: &Tensor) -> Result<QuantizedMatrix> {
        let matrix = restore(&self.name, tensor)?;
        expect_shape(&self.layer, &matrix)?;
        Ok(matrix)
    }
}

/// The quantised matrix of a state dictionary's entry.
pub(super) fn restore(name: &str, tensor: &Tensor) -> Result<QuantizedMatrix> {
    QuantizedMatrix::from_tensor(tensor).map_err(|e| Error::format("load_state_dict", format!("`{name}`: {e}")).with_source(e))
}

fn weight_name(layer: &Linear) -> String {
    if layer.name().is_empty() { "weight".to_owned() } else { format!("{}.weight", layer.name()) }
}

fn expect_shape(layer: &Linear, matrix: &QuantizedMatrix) -> Result<()> {
    if matrix.shape().dims() == [layer.outputs(), layer.inputs()] {
        return Ok(());
    }
    let message = format!("`{}` is [{}, {}], not {}", weight_name(layer), layer.outputs(), layer.inputs(), matrix.shape());
    Err(Error::shape("quantize", message))
}

impl Params {
    /// Keeps the weights of the [`Linear`] layers that `pattern` matches (as [`freeze`](Params::freeze) reads it) in few bits, and returns
    /// how many layers this changed. Their weights are parameters no more: the memory is freed (unless an optimiser, say, holds them),
    /// nothing trains them, and gradients pass through them to the layer's input, as QLoRA (Dettmers et al. 2023) needs it.
    ///
    /// ```
    /// # use kiln_models::nn::{Linear, Module, Params};
    /// # use kiln_tensor::{Quantization, Result, Tensor};
    /// # fn main() -> Result<()> {
    /// let params = Params::seeded(0);
    /// let layer = Linear::new(&params.scope("up"), 64, 4, true)?;
    /// assert_eq!(params.quantize_linears("*", Quantization::Int8 { group: 64 })?, 1);
    /// assert!(layer.quantized().is_some() && params.named("up.weight").is_none());
    /// assert_eq!(layer.forward(&Tensor::ones([2, 64], ())?)?.dims(), [2, 4]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If no layer matches, a matching layer has an adapter (quantise first), or its weight cannot be quantised so. Nothing is changed then.
    pub fn quantize_linears(&self, pattern: &str, kind: Quantization) -> Result<usize> {
        self.quantize_all(self.linears_matching(pattern)?, kind)
    }

    /// [`quantize_linears`](Params::quantize_linears) of the layers that `filter` takes, which may be none.
    ///
    /// # Errors
    /// If one of these layers has an adapter, or its weight cannot be quantised so. Nothing is changed then.
    pub fn quantize_linears_if(&self, filter: impl Fn(&Linear) -> bool, kind: Quantization) -> Result<usize> {
        self.quantize_all(self.linears().into_iter().filter(filter).collect(), kind)
    }

    fn quantize_all(&self, layers: Vec<Linear>, kind: Quantization) -> Result<usize> {
        let mut matrices = Vec::new();
        for layer in layers {
            let Some(weight) = layer.weight() else { continue };
            expect_no_adapter(&layer)?;
            let named = |e: Error| Error::new(e.kind(), "quantize", format!("`{}`: {e}", weight.name())).with_source(e);
            matrices.push((QuantizedMatrix::quantize(&weight.get(), kind).map_err(named)?, layer));
        }
        for (matrix, layer) in &matrices {
            self.set_quantized(layer, matrix.clone())?;
        }
        Ok(matrices.len())
    }

    /// Gives a layer of this root a weight that was quantised elsewhere, in place of its own.
    ///
    /// # Errors
    /// If its shape is not (outputs, inputs), or the layer has an adapter.
    pub fn set_quantized(&self, layer: &Linear, matrix: QuantizedMatrix) -> Result<()> {
        expect_no_adapter(layer)?;
        expect_shape(layer, &matrix)?;
        if let Some(param) = layer.weight() {
            self.withdraw(&param);
        }
        layer.set_weight(Weight::Quantized(matrix));
        Ok(())
    }

    /// Makes parameters of `dtype` of the quantised weights among the layers that `pattern` matches, and returns how many there were.
    /// They are frozen, as quantised weights are: [`unfreeze`](Params::unfreeze) those that are to be trained.
    ///
    /// # Errors
    /// If no layer matches, `dtype` is no float or there is no memory. Layers before the one that fails are changed then.
    pub fn dequantize_linears(&self, pattern: &str, dtype: DType) -> Result<usize> {
        let mut count = 0;
        for layer in self.linears_matching(pattern)? {
            let Some(matrix) = layer.quantized() else { continue };
            let param = Param::new(weight_name(&layer), &matrix.dequantize(dtype)?)?;
            param.freeze();
            layer.set_weight(Weight::Dense(param.clone()));
            self.reinstate(param);
            count += 1;
        }
        Ok(count)
    }
}

fn expect_no_adapter(layer: &Linear) -> Result<()> {
    match layer.adapter() {
        Some(_) => Err(Error::argument("quantize", format!("`{}` has an adapter: quantise before it is attached", layer.name()))),
        None => Ok(()),
    }
}
