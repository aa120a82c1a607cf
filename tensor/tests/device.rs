//! Devices: tensors that move, mixed devices, and what a machine without a GPU says. With `KILN_TEST_DEVICE=cuda` on a GPU, with
//! `KILN_CUDA=emulate` beside it on the emulator of one.

use kiln_tensor::{DType, Device, ErrorKind, Tensor, forbid_host};

fn gpu() -> Option<Device> {
    std::env::var("KILN_TEST_DEVICE").is_ok_and(|device| device == "cuda").then(|| Device::cuda(0).unwrap())
}

#[test]
fn names_of_devices() {
    assert_eq!("cpu".parse::<Device>().unwrap(), Device::Cpu);
    assert!("gpu".parse::<Device>().unwrap_err().to_string().contains("expected cpu, cuda or cuda:N"));
    let missing = "cuda:63".parse::<Device>().unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Device);
    assert!(missing.to_string().contains("cuda:63"), "{missing}");
    if let Some(device) = gpu() {
        assert_eq!(device.to_string(), "cuda:0");
    }
}

#[test]
fn values_and_gradients_move() {
    let Some(device) = gpu() else { return };
    for dtype in DType::ALL {
        let x = Tensor::arange(0.0, 6.0, 1.0, (dtype, Device::Cpu)).unwrap().reshape([2, 3]).unwrap();
        let there = x.t().unwrap().to_device(device).unwrap();
        assert_eq!((there.device(), there.dims()), (device, &[3, 2][..]));
        let back = there.t().unwrap().to_device(Device::Cpu).unwrap();
        let values = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
        assert_eq!(values(&back), values(&x), "{dtype}");
    }
    let x = Tensor::from_vec(vec![1f32, 2.0], 2).unwrap().to_device(device).unwrap();
    assert_eq!(x.narrow(0, 1, 1).unwrap().item::<f32>().unwrap(), 2.0);
    assert_eq!(format!("{x}"), "[1., 2.]");
}

#[test]
fn mixed_devices_are_an_error_that_says_what_to_do() {
    let Some(device) = gpu() else { return };
    let x = Tensor::ones([2, 2], (DType::F32, Device::Cpu)).unwrap();
    let y = x.to_device(device).unwrap();
    for result in [x.add(&y), y.matmul(&x), Tensor::cat(&[&x, &y], 0), y.masked_fill(&x.gt_scalar(0.0).unwrap(), 1.0)] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("move one with .to_device(..)"), "{error}");
    }
}

#[test]
fn a_host_computation_is_the_same_or_refused() {
    let Some(device) = gpu() else { return };
    let x = Tensor::arange(0.0, 4.0, 1.0, (DType::F32, Device::Cpu)).unwrap().to_device(device).unwrap();
    // A program's own kernel, which the GPU cannot know.
    let doubled = || {
        let view: Vec<f32> = x.as_slice::<f32>()?.iter().map(|v| 2.0 * v).collect();
        Tensor::build::<f32>(x.device(), x.shape(), |out| {
            out.copy_from_slice(&view);
            Ok(())
        })
    };
    let y = doubled().unwrap();
    assert_eq!((y.device(), y.add(&x).unwrap().to_vec::<f32>().unwrap()), (device, vec![0.0, 3.0, 6.0, 9.0]));
    let refused = forbid_host(doubled).unwrap_err();
    assert!(refused.to_string().contains("no kernel for cuda:0"), "{refused}");
    // What is written on the host is what the GPU sees next.
    let mut z = y.add_scalar(1.0).unwrap();
    z.as_slice_mut::<f32>().unwrap()[0] = 7.0;
    assert_eq!(z.mul_scalar(2.0).unwrap().to_vec::<f32>().unwrap(), [14.0, 6.0, 10.0, 14.0]);
}
