// Ends a matrix product whose k was cut into parts: adds the parts' sums in their order, and does what follows a sum.
#include "kiln.cuh"
#include "gemm.cuh"

extern "C" __global__ void __launch_bounds__(256) gemm_reduce(const GemmArgs args) {
    const i64 items = args.batch * args.m * args.n;
    for (i64 i = global_thread(); i < items; i += global_threads()) {
        Sum sum = args.partial[i];
        for (i64 split = 1; split < args.splits; ++split) {
            sum += args.partial[split * items + i];
        }
        const i64 line = i / args.n;
        const i64 batch = line / args.m;
        store_finished(args, sum, batch, line - batch * args.m, i - line * args.n);
    }
}
KILN_KERNEL(gemm_reduce)
