// Calls back from every thread of an OpenMP region, for tests/test_processes.py: what a program that runs
// models inside a parallel loop of its own does.
extern "C" void parallel_region(int threads, void (*call)()) {
#pragma omp parallel num_threads(threads)
  call();
}
