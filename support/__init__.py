"""What a student of diffusion need not read: no module but `published` knows anything of diffusion.

settings    dataclasses, and the command line           errors      errors of one line, notes, signals
launch      from settings to a trained run              trainer     what surrounds the loss in training
defaults    networks that suit an image size            loader      batches of one array of images
machine     device, precision, compilation, memory      processes   several processes, by torchrun
runs        run folders, checkpoints, logs              samples     images drawn in batches, grids, GIFs
images      image files to arrays and back              pictures    grids with captions, saved whole
cache       images decoded once                         files       files that are replaced whole
cars        the layouts of Stanford Cars                scenes      drawn shapes with captions
text        captions as tokens, labels by name          generators  random draws, one stream an image
measures    SSIM, frequency bands, Frechet distance     charts      charts and tables of a study
operators   linear maps of images: views, blurs         published   weights that others published
"""
