"""What a student of diffusion need not read: no equation of diffusion stands here.

settings    dataclasses, and the command line           errors      errors of one line, notes, signals
launch      from settings to a trained run              trainer     what surrounds the loss in training
machine     device, precision, compilation, bars        loader      batches of one array of images
processes   several processes, by torchrun              generators  random draws, one stream an image
runs        run folders, checkpoints, logs              samples     images drawn in batches, grids, GIFs
images      image files to arrays and back              pictures    grids with captions, saved whole
cache       images decoded once                         files       files that are replaced whole
latents     an autoencoder's latents of a data set      operators   views to undo, low-pass filters
cars        the layouts of Stanford Cars                scenes      drawn shapes with captions
text        captions as tokens, labels by name          published   weights that others published
measures    SSIM, frequency bands, Frechet distance     charts      charts and tables of a study
environment how long OpenMP's threads wait
"""
