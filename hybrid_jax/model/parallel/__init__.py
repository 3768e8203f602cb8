"""Where kernels and meshes meet: the model's ops on arrays that are split over devices."""
