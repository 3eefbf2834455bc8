// Threads of OpenVINO's pool, for the op and for calls from Python.
#pragma once

#include <openvino/core/parallel.hpp>
#if OV_THREAD == OV_THREAD_TBB || OV_THREAD == OV_THREAD_TBB_AUTO || OV_THREAD == OV_THREAD_TBB_ADAPTIVE
#include <tbb/task_arena.h>
#endif

#include "kernels/attention.hpp"

namespace crush {

inline int num_threads() { return parallel_get_max_threads(); }

// Idle threads take the next task: sizes differ, and other processes may slow a core down.
inline ParallelFor parallel_for() {
    return [](size_t n, const std::function<void(size_t)>& task) {
#if OV_THREAD == OV_THREAD_TBB || OV_THREAD == OV_THREAD_TBB_AUTO || OV_THREAD == OV_THREAD_TBB_ADAPTIVE
        if (n > 1) {
            // Callers hold a store's lock. Isolated, a thread that waits for the others takes none of the tasks
            // outside, such as an inference that would wait for the lock which this thread has.
            tbb::this_task_arena::isolate([&] {
                tbb::parallel_for(
                    tbb::blocked_range<size_t>(0, n, 1),
                    [&](const tbb::blocked_range<size_t>& range) {
                        for (size_t i = range.begin(); i < range.end(); ++i) task(i);
                    },
                    tbb::simple_partitioner());
            });
            return;
        }
        if (n == 1) task(0);
#else
        ov::parallel_for(n, [&](size_t i) { task(i); });
#endif
    };
}

}  // namespace crush
