//! Recorded work: a program of its own, since no other thread may use the GPU during a recording. With `KILN_TEST_DEVICE=cuda` on a GPU; the
//! emulator refuses to record.

use kiln_kernels::cuda::{CudaError, DeviceBuffer, Gpu, SliceMut, Type, gpu, gradient};

fn read(gpu: &Gpu, buffer: &DeviceBuffer) -> Vec<f32> {
    let mut bytes = vec![0; buffer.len()];
    gpu.download(buffer, 0, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn recorded_work_is_replayed_on_the_same_memory() {
    if !std::env::var("KILN_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
        return;
    }
    let gpu = gpu(0).unwrap();
    let bytes: Vec<u8> = [1f32, 2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut x = gpu.upload(&bytes).unwrap();
    let double = |x: &mut DeviceBuffer| gradient::scale(gpu, &mut SliceMut::new(x, Type::F32, 0, 3).unwrap(), 2.0);
    // Compiled before the recording.
    double(&mut x).unwrap();
    if gpu.is_emulated() {
        assert!(gpu.capture(|| double(&mut x)).is_err());
        return;
    }
    let (graph, scratch) = gpu
        .capture(|| {
            double(&mut x)?;
            assert!(
                matches!(gpu.upload(&bytes), Err(CudaError::Unavailable(_))),
                "a copy from the host would be read again at each replay"
            );
            gpu.alloc(1 << 20)
        })
        .unwrap();
    assert_eq!(read(gpu, &x), [2.0, 4.0, 6.0], "recording runs nothing");
    graph.replay().unwrap();
    graph.replay().unwrap();
    assert_eq!(read(gpu, &x), [8.0, 16.0, 24.0]);
    // Memory of the recording is the graph's: nobody else gets it while replays may write there.
    let address = scratch.ptr();
    drop(scratch);
    assert_ne!(gpu.alloc(1 << 20).unwrap().ptr(), address);
    let start = gpu.event().unwrap();
    graph.replay().unwrap();
    assert!(start.elapsed_ms(&gpu.event().unwrap()).unwrap() >= 0.0);
}
