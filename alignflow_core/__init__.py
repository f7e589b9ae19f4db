"""AlignFlow (arXiv 2604.02868): image and mask pairs in the look of a target clinic, from a few unlabelled images of it.

 step                                                               file               in the paper
 1. read source pairs and target images, split by patient           ``data.py``        its settings
 2. train a flow over masks                                         ``mask_flow.py``   mask synthesis
 3. train a flow that paints an image from a mask                   ``image_flow.py``  stage 1, denoising loss on the source
 4. raise a differentiable reward towards the reference images      ``align.py``       stage 2, alignment with denoising loss
    (whose regions ``labeller.py`` finds; parts in ``reward/``)                        our choice
 5. draw masks and paint them, before and after alignment           ``sample.py``      synthesis and mask post-processing
 6. keep plausible, novel, mask-true pairs                          ``filtering.py``   our choice
 7. train segmenters on real and synthetic pairs                    ``segment.py``     downstream use
 8. score every arm on held-out target images                       ``evaluate.py``    tables of Dice, IoU and image distances
    (whether images give patients away: ``privacy.py``)                                our choice
 9. compare the arms with paired statistics                         ``compare.py``     our choice
    (other painters to compare with: ``comparator.py``, parts in ``painters/``)        its comparators
10. put tables, image grids and feature maps on one page            ``report.py``      figures
    (the paper's own tables and figures from finished runs: ``paper.py``)              its tables
"""
