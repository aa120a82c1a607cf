//! Tables of [`AxisMap`]s in the GPU's memory, for pooling and resampling. Layers use the same few maps at every step, so tables that were uploaded
//! once are kept.

use super::launch::impl_arg;
use super::{CudaError, DeviceBuffer, DevicePtr, Gpu, Type};
use crate::cpu::resample::AxisMap;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// `AxisTable` of `axis_maps.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct AxisTable {
    inputs: i32,
    outputs: i32,
    starts: i32,
    indices: i32,
    weights: i32,
    divisors: i32,
}

/// `AxisTables` of `axis_maps.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct AxisTables {
    axis: [AxisTable; 3],
}

impl_arg!(AxisTables);

/// Three maps as kernels take them: where they lie, and the factors and whole numbers of all of them.
pub(super) struct Uploaded {
    pub tables: AxisTables,
    pub factors: DevicePtr,
    pub numbers: DevicePtr,
    /// Keeps the memory.
    _buffer: Arc<DeviceBuffer>,
}

/// Sets of tables that are kept for a GPU. A program that uses more starts anew.
const KEPT: usize = 256;

type Kept = HashMap<(usize, Vec<u8>), Arc<DeviceBuffer>>;

/// The maps in the GPU's memory, factors in the type that `ty` computes in.
pub(super) fn upload(gpu: &'static Gpu, maps: &[AxisMap; 3], ty: Type) -> Result<Uploaded, CudaError> {
    static TABLES: OnceLock<Mutex<Kept>> = OnceLock::new();
    let too_large = || CudaError::Unavailable("pooling and resampling on the GPU count positions in 32 bits".into());
    let mut tables = AxisTables::default();
    let (mut bytes, mut numbers) = (Vec::new(), Vec::<i32>::new());
    let mut factors = 0;
    let mut push = |value: f64| match ty {
        Type::F64 => bytes.extend_from_slice(&value.to_ne_bytes()),
        _ => bytes.extend_from_slice(&(value as f32).to_ne_bytes()),
    };
    for (table, map) in tables.axis.iter_mut().zip(maps) {
        let number = |n: usize| i32::try_from(n).map_err(|_| too_large());
        let taps: usize = (0..map.outputs()).map(|o| map.row(o).len()).sum();
        // The last of all numbers and factors fits if this does.
        number(numbers.len() + map.outputs() + 1 + taps + map.inputs())?;
        let rows = || (0..map.outputs()).map(|o| map.row(o));
        *table = AxisTable {
            inputs: map.inputs() as i32,
            outputs: map.outputs() as i32,
            starts: numbers.len() as i32,
            indices: (numbers.len() + map.outputs() + 1) as i32,
            weights: factors,
            divisors: factors + taps as i32,
        };
        factors += (taps + map.outputs()) as i32;
        let mut start = 0;
        numbers.push(start);
        for row in rows() {
            start += row.len() as i32;
            numbers.push(start);
        }
        numbers.extend(rows().flatten().map(|t| t.index as i32));
        rows().flatten().for_each(|t| push(t.weight));
        (0..map.outputs()).for_each(|o| push(map.divisor(o)));
    }
    let numbers_at = bytes.len();
    bytes.extend(numbers.iter().flat_map(|n| n.to_ne_bytes()));
    let mut kept = TABLES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let key = (gpu.ordinal(), bytes);
    let buffer = match kept.get(&key) {
        Some(buffer) => buffer.clone(),
        None => {
            if kept.len() >= KEPT {
                kept.clear();
            }
            let buffer = Arc::new(gpu.upload(&key.1)?);
            kept.insert(key, buffer.clone());
            buffer
        }
    };
    Ok(Uploaded { tables, factors: buffer.ptr(), numbers: buffer.ptr().add_bytes(numbers_at), _buffer: buffer })
}
