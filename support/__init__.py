"""What a student of diffusion need not read: nothing in here knows of noise levels, schedules or guidance.

settings    settings as dataclasses, and the command line made from them
errors      errors of one line, notes, signals          machine    device, precision, compilation
trainer     the training loop around a loss             loader     batches of one array of images
runs        run folders, checkpoints, logs              files      files that are replaced whole
processes   several processes, started by torchrun      generators random draws, one generator an image
images      image files to arrays and back              pictures   grids with captions, GIFs
folders     folders of images as data sets              cache      images decoded once
cars        the layouts of Stanford Cars                scenes     drawn shapes with captions
text        captions as tokens, labels by name          published  weights that others published
measures    SSIM, frequency bands, Frechet distance     charts     charts and tables of a study, its report
operators   linear maps of images: views, blurs
"""
